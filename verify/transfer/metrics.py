"""What a grid of runs says of transfer: where the optimum is, what transferring costs, how sharp the curves are."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any


@dataclass(frozen=True)
class Curve:
    """Loss against learning rate at one width; losses are means over seeds, infinite where any of them diverged."""

    parametrization: str
    width: int
    lrs: tuple[float, ...]
    losses: tuple[float, ...]
    errors: tuple[float, ...]  # standard errors over seeds; NaN for a single one

    @property
    def best(self) -> int:
        return min(range(len(self.losses)), key=lambda index: self.losses[index])

    @property
    def at_edge(self) -> bool:
        """Whether the lowest loss is at an end of the grid, so that the optimum may lie beyond."""
        return self.best in (0, len(self.lrs) - 1)

    @property
    def optimum(self) -> float:
        """log2 of the best learning rate: the vertex of the parabola through the lowest point and its neighbours."""
        at = [math.log2(lr) for lr in self.lrs]
        best = self.best
        if self.at_edge or not all(map(math.isfinite, self.losses[best - 1 : best + 2])):
            return at[best]
        (x0, x1, x2), (y0, y1, y2) = at[best - 1 : best + 2], self.losses[best - 1 : best + 2]
        left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
        bend = (right - left) / (x2 - x0)
        return x1 if bend <= 0 else (x0 + x1) / 2 - left / (2 * bend)

    def at(self, lr: float) -> float:
        """The loss at a learning rate of the grid."""
        return self.losses[self.lrs.index(lr)]


@dataclass(frozen=True)
class Transfer:
    """From the base width to another: ``shift`` of the optimum in octaves, ``regret`` in nats (the loss at the base
    width's best learning rate, less the best of the grid) with its standard error, ``sensitivity`` (the rise of the
    loss one octave off the optimum, the mean of both sides)."""

    parametrization: str
    width: int
    best_lr: float
    best_loss: float
    shift: float
    regret: float
    error: float
    sensitivity: float
    at_edge: bool
    diverged: int


def curves(entries: Iterable[Mapping[str, Any]]) -> list[Curve]:
    """All curves of a results file; runs at the base width count for every parametrization, as they are the same."""
    entries = list(entries)
    names = {entry["parametrization"] for entry in entries}
    points: dict[tuple[str, int], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for entry in entries:
        loss = math.inf if entry["diverged"] is not None else entry["loss"]
        at_base = entry["width"] == entry["sizes"]["width"]
        for name in names if at_base else {entry["parametrization"]}:
            points[name, entry["width"]][entry["lr"]].append(loss)
    made = []
    for (name, width), by_lr in sorted(points.items()):
        lrs = sorted(by_lr)
        losses = tuple(mean(by_lr[lr]) for lr in lrs)
        errors = tuple(
            stdev(by_lr[lr]) / len(by_lr[lr]) ** 0.5
            if len(by_lr[lr]) > 1 and all(map(math.isfinite, by_lr[lr]))
            else math.nan
            for lr in lrs
        )
        made.append(Curve(name, width, tuple(lrs), losses, errors))
    return made


def transfers(entries: Iterable[Mapping[str, Any]]) -> list[Transfer]:
    """For each parametrization and width, what transferring from its smallest width means."""
    found = []
    grouped: dict[str, list[Curve]] = defaultdict(list)
    for curve in curves(entries):
        if any(map(math.isfinite, curve.losses)):
            grouped[curve.parametrization].append(curve)
    for name, family in grouped.items():
        base = min(family, key=lambda curve: curve.width)
        tuned = base.lrs[base.best]
        for curve in family:
            best = curve.best
            at_tuned = curve.at(tuned) if tuned in curve.lrs else math.nan
            index = curve.lrs.index(tuned) if tuned in curve.lrs else best
            found.append(
                Transfer(
                    name,
                    curve.width,
                    curve.lrs[best],
                    curve.losses[best],
                    curve.optimum - base.optimum,
                    at_tuned - curve.losses[best],
                    math.hypot(curve.errors[index], curve.errors[best]) if index != best else 0.0,
                    _sensitivity(curve),
                    curve.at_edge,
                    sum(map(math.isinf, curve.losses)),
                )
            )
    return found


def _sensitivity(curve: Curve) -> float:
    """Both neighbours one octave from the lowest point, where the grid has them."""
    center = curve.lrs[curve.best]
    rises = []
    for factor in (0.5, 2.0):
        near = min(curve.lrs, key=lambda lr: abs(math.log2(lr / (center * factor))))
        if abs(math.log2(near / (center * factor))) < 0.1:
            rises.append(curve.at(near) - curve.losses[curve.best])
    return mean(rises) if rises else math.nan
