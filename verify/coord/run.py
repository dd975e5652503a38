"""Train at every width and seed, and note sizes: of tensors, gradients, parameters, and of what the steps changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import exp, log
from statistics import fmean

import torch
from torch import Tensor

from widthwise.derive.errors import DeriveError
from widthwise.verify.coord.subject import Batch, Model, Snapshot, Subject

Key = tuple[str, str, int, str]
"""(kind, name, step, statistic): what was measured, of what, after how many steps, and how."""


@dataclass
class Measurements:
    """Sizes by key, then by seed, in the order of ``widths``."""

    widths: tuple[int, ...]
    sizes: dict[Key, dict[int, list[float]]] = field(default_factory=dict)
    shortest: dict[tuple[str, str], int] = field(default_factory=dict)  # last axis of each quantity, where smallest

    def look(self, kind: str, name: str, step: int, seed: int, value: Tensor) -> None:
        """Note the sizes of a tensor."""
        self.note(kind, name, step, seed, rms=rms(value), typical=typical(value), entries=typical(value[..., None]))
        self.shortest[kind, name] = min(value.shape[-1], self.shortest.get((kind, name), value.shape[-1]))

    def note(self, kind: str, name: str, step: int, seed: int, **statistics: float) -> None:
        """Note numbers; a model's are noted width by width."""
        for statistic, value in statistics.items():
            self.sizes.setdefault((kind, name, step, statistic), {}).setdefault(seed, []).append(value)

    def rows(self, kind: str, name: str, step: int, statistic: str) -> list[list[float]]:
        """Sizes [seed][width] of one quantity; empty where it was not measured at every width."""
        found = self.sizes.get((kind, name, step, statistic), {})
        return [row for row in found.values() if len(row) == len(self.widths)]

    @property
    def whole_seeds(self) -> int:
        """How many seeds were run at every width."""
        return len(self.rows("forward", "loss", 0, "value"))

    def average(self, kind: str, name: str, step: int, statistic: str) -> list[float]:
        """Geometric means over seeds, by width; empty where it was not measured, or is zero."""
        columns = list(zip(*self.rows(kind, name, step, statistic), strict=True))
        if not columns or any(min(column) <= 0.0 for column in columns):
            return []
        return [exp(fmean(map(log, column))) for column in columns]


class Diverged(DeriveError):
    """A number that is none, with the step and the tensor where it first appeared."""


def measure(
    subject: Subject,
    widths: Sequence[int],
    seeds: Iterable[int],
    *,
    steps: int = 2,
    progress: Callable[[], None] = lambda: None,
    into: Measurements | None = None,
) -> Measurements:
    """Run ``steps`` optimizer steps on one batch a seed, looking at everything before the first and after each.

    ``progress`` is called after each model; what was measured goes ``into`` something that outlives an interruption,
    if given. Denormal numbers are flushed on the CPU for as long as this runs, because
    a decayed state is full of them.

    Raises:
        Diverged: when a tensor, a gradient or a parameter stops being finite.
    """
    found = Measurements(tuple(widths)) if into is None else into
    torch.set_flush_denormal(True)
    try:
        for seed in seeds:
            batch = subject.batch(seed)
            for width in widths:
                _one(subject.make(width, seed), batch, steps, found, width, seed)
                progress()
    finally:
        torch.set_flush_denormal(False)
    return found


def _one(model: Model, batch: Batch, steps: int, found: Measurements, width: int, seed: int) -> None:
    start: Snapshot | None = None
    for step in range(steps + 1):
        tensors = model.forward(batch)
        _check_finite(tensors, f"width {width}, step {step}, forward")
        now = Snapshot({name: each.detach() for name, each in tensors.items()}, _copies(model.parameters))
        if start is None:
            start = now
            for role, value in now.parameters.items():
                found.look("weight", role, 0, seed, value)
        else:
            for effect in model.effects(start, now, batch):
                _note_change(found, "own step", effect.name, step, seed, effect.own)
                if effect.upstream is not None:
                    _note_change(found, "upstream", effect.name, step, seed, effect.upstream)
        for name, value in now.tensors.items():
            if value.dim():
                found.look("forward", name, step, seed, value)
                if step:
                    found.look("change", name, step, seed, value - start.tensors[name])
            else:
                found.note("forward", name, step, seed, value=float(value))
        if step == steps:
            return
        model.optimizer.zero_grad(set_to_none=True)
        tensors["loss"].backward()  # type: ignore[no-untyped-call]
        gradients = {name: each.grad for name, each in tensors.items() if each.retains_grad and each.grad is not None}
        _check_finite(gradients, f"width {width}, step {step}, gradient of")
        for name, gradient in gradients.items():
            found.look("gradient", name, step, seed, gradient)
        weights = {role: each.grad for role, each in model.parameters.items() if each.grad is not None}
        _check_finite(weights, f"width {width}, step {step}, gradient of")
        for role, gradient in weights.items():
            found.look("weight gradient", role, step, seed, gradient)
        model.optimizer.step()


def _note_change(found: Measurements, kind: str, name: str, step: int, seed: int, change: Tensor) -> None:
    """A change with the part that all tokens share: its mean over the batch is coherent, the rest is not."""
    found.look(kind, name, step, seed, change)
    if change.dim() > 2:
        shared = change.flatten(0, 1).mean(0)
        found.note(kind, name, step, seed, coherent=rms(shared), incoherent=rms(change - shared))


def _copies(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {role: value.detach().clone() for role, value in parameters.items()}


def _check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    for name, value in tensors.items():
        if not torch.isfinite(value).all():
            raise Diverged(
                f"{name} is not finite ({where})",
                cure="lower the learning rate, or see what the rules say of its scale",
            )


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def typical(x: Tensor) -> float:
    """The size of a typical row: rms along the last axis, geometric mean over all others.

    Behind a norm gradients are heavy-tailed, because it divides by the tiny norms of a few tokens, and the rms of all
    tells of those alone. (The geometric mean of single entries would also feel how Gaussian they are, which changes
    with the width.) Rows of zeros, such as the gradients of tokens that do not occur, are left out.
    """
    rows = x.square().mean(-1)
    rows = rows[rows > 0]
    return float(rows.log().mean().div(2).exp()) if rows.numel() else 0.0
