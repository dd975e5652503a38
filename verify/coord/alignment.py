"""Which assumption set a model obeys: how coherent each kind of sum is, contraction by contraction.

A sum of N terms is √N times as large as one of them when signs are independent and N times when they agree. The measure
is the ratio of a sum to the root of the sum of its squared terms (√N times a cosine), which is 1 for independent signs:
as a slope in the width it is 0 where the sum is incoherent and half the axis' exponent where it is coherent. (Everett
et al. 2024, arXiv:2407.05872, section 3, define alignment by the same ratio, at one width.) A coherent part c of each
term shows as ratio² = 1 + c²N, so that it takes over where N passes c⁻².
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import inf, sqrt

import torch
from torch import Tensor

from widthwise.derive.graph import Dim, Node, Shape, atoms, extent
from widthwise.derive.ops.einsum import summed
from widthwise.verify.coord.described import Described, Run
from widthwise.verify.coord.predict import used_in
from widthwise.verify.coord.run import Measurements
from widthwise.verify.coord.stats import Slope, fit
from widthwise.verify.coord.subject import Batch, Model, Snapshot
from widthwise.verify.execute import apply

Batches = Callable[[int], Iterator[Batch]]

SUMS = {
    "activations": "two activations met (q·k)",
    "own step": "a parameter's change met with its input (ΔW·x)",
    "upstream": "an initial weight met with the change of its input (W₀·Δx)",
    "forward·backward": "a forward quantity met with a gradient (v·∂L/∂o, gains shared by heads)",
}


@dataclass(frozen=True)
class Alignment:
    """How coherent one sum is after some steps.

    ``half`` is the slope that coherence would have (half the exponent of the axes that are summed); ``ratio`` the
    ratio at the largest width; ``crossover`` the width from which on the coherent part would rule (infinite where none
    is seen).
    """

    kind: str
    name: str
    step: int
    half: float
    slope: Slope
    ratio: float
    crossover: float

    @property
    def verdict(self) -> str:
        """``coherent``, ``incoherent``, or ``unresolved`` where two standard errors reach across the middle."""
        middle, reach = self.half / 2, 2 * self.slope.error
        if abs(self.slope.value - middle) <= reach:
            return "unresolved"
        return "coherent" if self.slope.value > middle else "incoherent"


# What each assumption set takes these sums to be; what it takes either way, or by symmetry, says nothing here.
TAKEN = {
    "at-init": {"own step": "coherent", "forward·backward": "incoherent"},
    "aligned": {"own step": "coherent", "forward·backward": "coherent", "activations": "coherent"},
    "unaligned": {"own step": "incoherent", "forward·backward": "incoherent", "upstream": "incoherent"},
}


def obeys(measured: Sequence[Alignment]) -> tuple[str, ...]:
    """The assumption sets that most of what was resolved agrees with, kind by kind."""
    found = []
    for name, taken in TAKEN.items():
        votes = {kind: [each.verdict for each in measured if each.kind == kind] for kind in taken}
        if all(
            2 * verdicts.count(taken[kind]) >= len([each for each in verdicts if each != "unresolved"])
            for kind, verdicts in votes.items()
        ):
            found.append(name)
    return tuple(found)


Halves = dict[tuple[str, str], tuple[float, dict[int, int]]]
"""Per sum: half the exponent of the axes that are summed, and by width how many terms it has."""


def align(
    subject: Described,
    widths: Sequence[int],
    seeds: Sequence[int],
    at: Sequence[int],
    *,
    batches: Batches | None = None,
    progress: Callable[[], None] = lambda: None,
) -> tuple[list[Alignment], Measurements]:
    """Train to each of the steps ``at`` and measure every sum over an axis that grows, on the first batch of a seed.

    ``batches`` gives a seed's data for ever (default: the subject's one batch). Returns the alignments, and the
    typical sizes of parameter gradients beside them.
    """
    found, halves = watch(subject, widths, seeds, at, batches=batches, progress=progress)
    return alignments(found, halves, at), found


def watch(
    subject: Described,
    widths: Sequence[int],
    seeds: Sequence[int],
    at: Sequence[int],
    *,
    batches: Batches | None = None,
    progress: Callable[[], None] = lambda: None,
) -> tuple[Measurements, Halves]:
    """What :func:`align` measures, before any slope: measurements of several seeds can be joined."""
    found = Measurements(tuple(widths))
    halves: Halves = {}
    torch.set_flush_denormal(True)
    try:
        for seed in seeds:
            for width in widths:
                data = iter(lambda: subject.batch(seed), None) if batches is None else batches(seed)  # noqa: B023
                model = subject.make(width, seed)
                assert isinstance(model, Run)
                _train(model, data, at, found, halves, width, seed)
                progress()
    finally:
        torch.set_flush_denormal(False)
    return found, halves


def alignments(found: Measurements, halves: Halves, at: Sequence[int]) -> list[Alignment]:
    """Every sum's coherence as a slope in the width."""
    made = []
    for kind, name in halves:
        half, lengths = halves[kind, name]
        for step in at:
            rows = [row for row in found.rows(kind, name, step, "ratio") if min(row) > 0]
            if rows:
                ratio = found.average(kind, name, step, "ratio")[-1]
                made.append(
                    Alignment(kind, name, step, half, fit(found.widths, rows), ratio, _takes_over(ratio, half, lengths))
                )
    return made


def _takes_over(ratio: float, half: float, lengths: dict[int, int]) -> float:
    """The width at which the coherent part of a sum is as large as the rest."""
    widest = max(lengths)
    coherent = (ratio**2 - 1) / lengths[widest]
    return inf if coherent <= 0 else widest * (1 / coherent / lengths[widest]) ** (1 / (2 * half))


def _train(
    model: Run,
    data: Iterator[Batch],
    at: Sequence[int],
    found: Measurements,
    halves: Halves,
    width: int,
    seed: int,
) -> None:
    probe = batch = next(data)
    start: Snapshot | None = None
    for step in range(max(at) + 1):
        if step in at or start is None:
            tensors = gradients(model, probe)
            now = Snapshot(
                {name: each.detach() for name, each in tensors.items()},
                {role: each.detach().clone() for role, each in model.parameters.items()},
            )
            start = now if start is None else start
            for kind, name, over, ratio in _sums(model, probe, start, now, tensors):
                length = 1
                for dim in over:
                    length *= model.setting.size(dim)
                lengths = halves.setdefault((kind, name), (float(extent(over)) / 2, {}))[1]
                lengths[width] = length
                found.note(kind, name, step, seed, ratio=ratio)
            for role, parameter in model.parameters.items():
                if parameter.grad is not None:
                    found.note("weight gradient", role, step, seed, rms=sqrt(float(parameter.grad.square().mean())))
            found.note("loss", "loss", step, seed, value=float(tensors["loss"].detach()))
        gradients(model, batch)
        model.optimizer.step()
        batch = next(data)


def gradients(model: Model, batch: Batch) -> dict[str, Tensor]:
    """All tensors of a forward pass, with the gradients of one backward pass on them and on the parameters."""
    model.optimizer.zero_grad(set_to_none=True)
    tensors = model.forward(batch)
    tensors["loss"].backward()  # type: ignore[no-untyped-call]
    return tensors


@torch.no_grad()
def _sums(
    model: Run, batch: Batch, start: Snapshot, now: Snapshot, tensors: dict[str, Tensor]
) -> Iterator[tuple[str, str, tuple[Dim, ...], float]]:
    """(kind, name, axes summed over, ratio) of every sum over an axis that grows."""
    graph = model.subject.graph
    for node in graph.ordered:
        if node.op == "linear":
            source, role = node.inputs
            over = _growing(graph.shapes[role][-1:])
            pairs = {
                "own step": (now.tensors[source], now.parameters[role] - start.parameters[role]),
                "upstream": (now.tensors[source] - start.tensors[source], start.parameters[role]),
            }
            for kind, (x, weight) in pairs.items() if over and role in start.parameters else ():
                if bool(x.any()) and bool(weight.any()):
                    whole = _linear(model, node, batch, x, weight)
                    squares = _linear(model, node, batch, x.square(), weight.square())
                    by = _linear(model, node, batch, torch.ones_like(x), torch.ones_like(weight)).mean()
                    count = _count(model, atoms(graph.shapes[role][-1:]))
                    multiplier = float(by) / count  # of the node, which squares have to have twice
                    yield kind, used_in(role, node.output), over, _ratio(whole, squares * multiplier)
        elif node.op == "scan":
            q, k, v = node.inputs[:3]
            if over := _growing(graph.shapes[q][-1:]):
                terms = now.tensors[q] * now.tensors[k]
                yield "activations", f"{q}·{k}", over, _ratio(terms.sum(-1), terms.square().sum(-1))
            if (over := _growing(graph.shapes[v][-1:])) and (gradient := tensors[node.output].grad) is not None:
                terms = gradient * now.tensors[v]
                yield "forward·backward", f"{v}·∂L/∂{node.output}", over, _ratio(terms.sum(-1), terms.square().sum(-1))
        elif node.op == "einsum" and (gradient := tensors[node.output].grad) is not None:
            for mine, other in (node.inputs, node.inputs[::-1]):
                over = _growing(
                    (*graph.shapes[other], *node.shape), summed(node.shape, graph.shapes[other], graph.shapes[mine])
                )
                if mine in graph.parameters and over and gradient.shape == now.tensors[other].shape:
                    terms = gradient * now.tensors[other]
                    axes = [2 + index for index, dim in enumerate(atoms(node.shape)) if dim in over]
                    yield "forward·backward", f"∂L/∂{mine}", over, _ratio(terms.sum(axes), terms.square().sum(axes))


def _growing(shape: Shape, among: tuple[Dim, ...] | None = None) -> tuple[Dim, ...]:
    dims = dict.fromkeys(atoms(shape))
    return tuple(dim for dim in dims if dim.exponent != 0 and (among is None or dim in among))


def _count(model: Run, dims: tuple[Dim, ...]) -> int:
    count = 1
    for dim in dims:
        count *= model.setting.size(dim)
    return count


def _linear(model: Run, node: Node, batch: Batch, x: Tensor, weight: Tensor) -> Tensor:
    return apply(model.subject.graph, model.subject.table, model.setting, node, [x, weight], batch)


def _ratio(whole: Tensor, squares: Tensor) -> float:
    """The rms of sums over what independent signs would make of each, so that no heavy tail counts for more."""
    there = squares > 0
    return sqrt(float((whole.square()[there] / squares[there]).mean()))
