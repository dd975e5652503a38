"""Train at every width and seed, and note sizes: of tensors, gradients, parameters, and of what the steps changed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import exp, isfinite, log, sqrt
from statistics import fmean

import torch
from torch import Tensor

from widthwise.derive.errors import DeriveError
from widthwise.verify.coord.subject import Batch, Effect, Model, Snapshot, Subject

ROUNDING = 1e-3  # of the median
CANCELLED = 1e-5  # of the largest entry of its row: a zero that two equal terms have made
SHORT = 16  # rows with fewer entries than that are no sample of their own

Key = tuple[str, str, int, str]
"""(kind, name, step, statistic): what was measured, of what, after how many steps, and how.

rms: of all entries. typical: the geometric mean over rows, along the last axis, of their rms. Behind a norm gradients
are heavy-tailed, because it divides by the tiny norms of a few tokens, and the rms of all tells of those alone.
entries: the geometric mean of single entries, of quantities whose rows are short; of others it would feel how Gaussian
they are, which changes with the width. What is zero but for rounding is left out of both: gradients of tokens that do
not occur, or of a sequence's first query, whose output is normalized to the value's direction whatever its length.
"""


@dataclass
class Measurements:
    """Sizes by key, then by seed, in the order of ``widths``."""

    widths: tuple[int, ...]
    sizes: dict[Key, dict[int, list[float]]] = field(default_factory=dict)
    shortest: dict[tuple[str, str], int] = field(default_factory=dict)  # last axis of each, at the smallest width

    def note(self, kind: str, name: str, step: int, seed: int, **statistics: float) -> None:
        """Note numbers; a model's are noted width by width."""
        for statistic, value in statistics.items():
            self.sizes.setdefault((kind, name, step, statistic), {}).setdefault(seed, []).append(value)

    def join(self, other: Measurements) -> None:
        """Take in what was measured of other seeds, or of the same ones at the widths that come next."""
        for key, rows in other.sizes.items():
            for seed, row in rows.items():
                self.sizes.setdefault(key, {}).setdefault(seed, []).extend(row)
        self.shortest = other.shortest | self.shortest

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

    def means(self, kind: str, name: str, step: int, statistic: str) -> list[float]:
        """Arithmetic means over seeds, by width."""
        return [fmean(column) for column in zip(*self.rows(kind, name, step, statistic), strict=True)]


class Diverged(DeriveError):
    """A number that is none, with the step and the tensor where it first appeared."""


def measure(
    subject: Subject,
    widths: Sequence[int],
    seeds: Iterable[int],
    *,
    steps: int = 2,
    wanted: Container[str] | None = None,
    progress: Callable[[], None] = lambda: None,
    into: Measurements | None = None,
) -> Measurements:
    """Run ``steps`` optimizer steps on one batch a seed, looking at everything before the first and at changes
    after each.

    Only names in ``wanted`` are looked at, if given. ``progress`` is called after each model; what was measured goes
    ``into`` something that outlives an interruption, if given. Denormal numbers are flushed on the CPU for as long as
    this runs, because a decayed state is full of them.

    Raises:
        Diverged: when a tensor, a gradient or a parameter stops being finite.
    """
    found = Measurements(tuple(widths)) if into is None else into
    torch.set_flush_denormal(True)
    try:
        for seed in seeds:
            batch = subject.batch(seed)
            for width in widths:
                _one(subject.make(width, seed), batch, steps, _Look(found, width, seed, wanted))
                progress()
    finally:
        torch.set_flush_denormal(False)
    return found


@dataclass(frozen=True)
class _Look:
    """Notes what is seen of one model."""

    found: Measurements
    width: int
    seed: int
    wanted: Container[str] | None

    def at(self, kind: str, name: str, step: int, value: Tensor) -> None:
        """Note the sizes of a tensor.

        Raises:
            Diverged: when not all of it is finite.
        """
        if self.wanted is not None and name not in self.wanted:
            return
        value = value.detach()
        squares = value.square()
        rows = squares.mean(-1) if value.dim() else squares
        overall = float(rows.mean())
        if not isfinite(overall):
            raise Diverged(
                f"{name} is not finite ({kind}, width {self.width}, step {step})",
                cure="lower the learning rate (--lr), or see what the rules say of its scale",
            )
        found, seed = self.found, self.seed
        if not value.dim():
            found.note(kind, name, step, seed, value=float(value))
            return
        found.note(kind, name, step, seed, rms=sqrt(overall), typical=_typical(rows))
        if found.shortest.setdefault((kind, name), value.shape[-1]) < SHORT:
            found.note(kind, name, step, seed, entries=_typical(squares))

    def change(self, kind: str, name: str, step: int, value: Tensor) -> None:
        """The same of a change, and of the part of it that all tokens share: its mean over the batch is coherent, the
        rest is not."""
        self.at(kind, name, step, value)
        if value.dim() > 2 and (self.wanted is None or name in self.wanted):
            shared = value.flatten(0, 1).mean(0)
            parts = {"coherent": shared, "incoherent": value - shared}
            self.found.note(
                kind, name, step, self.seed, **{key: sqrt(float(part.square().mean())) for key, part in parts.items()}
            )


def _one(model: Model, batch: Batch, steps: int, look: _Look) -> None:
    start: Snapshot | None = None
    made_by: dict[str, Tensor] = {}
    for step in range(steps + 1):
        tensors = model.forward(batch)
        parameters = {role: value.detach() for role, value in model.parameters.items()}
        now = Snapshot({name: each.detach() for name, each in tensors.items()}, parameters)
        if start is None:
            for name, value in now.tensors.items():
                look.at("forward", name, step, value)
            start = Snapshot(now.tensors, {role: value.clone() for role, value in parameters.items()})
            for role, value in now.parameters.items():
                look.at("weight", role, 0, value)
        else:
            with torch.no_grad():
                for name, value in now.tensors.items():
                    look.at("change", name, step, value - start.tensors[name])
                for role, value in parameters.items() if step == 1 else ():
                    look.at("step", role, step, value - start.parameters[role])
                for effect in model.effects(start, now, batch):
                    look.change("own step", effect.name, step, _where_made(effect, made_by))
                    if effect.upstream is not None:
                        look.change("upstream", effect.name, step, effect.upstream)
        if step == steps:
            return
        model.optimizer.zero_grad(set_to_none=True)
        tensors["loss"].backward()  # type: ignore[no-untyped-call]
        gradients = {
            name: _uncancelled(value.grad)
            for name, value in reversed(tensors.items())
            if value.retains_grad and value.grad is not None
        }
        for name, value in gradients.items():
            made_by[name] = made_by.get(name, False) | (value != 0)
        if step == 0:
            for name, value in gradients.items():
                look.at("gradient", name, step, value)
            for role, value in model.parameters.items():
                if value.grad is not None:
                    look.at("weight gradient", role, step, value.grad)
        _step(model, batch)


def _step(model: Model, batch: Batch) -> None:
    """One step; an optimizer that evaluates the loss itself (LBFGS) is given a way to.

    Raises:
        DeriveError: when the optimizer does.
    """

    def evaluate() -> Tensor:
        model.optimizer.zero_grad(set_to_none=True)
        loss = model.forward(batch)["loss"]
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    closure = inspect.signature(model.optimizer.step).parameters.get("closure")
    try:
        if closure is not None and closure.default is closure.empty:
            model.optimizer.step(evaluate)  # type: ignore[arg-type]
        else:
            model.optimizer.step()
    except Exception as error:  # an optimizer of somebody's, which may raise anything
        raise DeriveError(
            f"{type(model.optimizer).__name__}.step() failed: {type(error).__name__}: {error}",
            cure="give an optimizer that can take a step of this model",
        ) from error


def _uncancelled(gradient: Tensor) -> Tensor:
    """A gradient with zeros where it is zero but for rounding, as it is to experts that a token is not sent to."""
    if not gradient.dim():
        return gradient
    size = gradient.abs()
    return torch.where(size > CANCELLED * size.amax(-1, keepdim=True), gradient, 0.0)


def _where_made(effect: Effect, made_by: Mapping[str, Tensor]) -> Tensor:
    """A parameter's own step at the entries that made it: ΔW is a sum over the tokens whose gradient is not zero, so it
    is coherent with them, and noise to the others (a router's row is made by the tokens sent to its expert)."""
    made = made_by.get(effect.name.partition(" in ")[2])
    return effect.own if made is None or made.shape != effect.own.shape else torch.where(made, effect.own, 0.0)


def _typical(squares: Tensor) -> float:
    """The root of the geometric mean of those that are not zero but for rounding."""
    found = squares[squares > 0]
    if not found.numel():
        return 0.0
    found = found[found > ROUNDING**2 * found.median()]
    return exp(float(found.log().mean()) / 2)
