"""What a grid of runs says of transfer: where the optimum is, what transferring costs, how sharp the curves are."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import mean, median, stdev
from typing import Any

import torch

FLAT = 0.01
"""Nats above the lowest loss up to which a curve is called flat: what transfer may cost here."""


@dataclass(frozen=True)
class Curve:
    """Loss against learning rate at one width. Every seed has a loss at some of the learning rates, infinite where it
    diverged."""

    parametrization: str
    width: int
    lrs: tuple[float, ...]
    by_seed: Mapping[int, Mapping[float, float]]

    @cached_property
    def losses(self) -> tuple[float, ...]:
        """Means over seeds, as if each had all learning rates: a seed's share is what it is off the fullest one where
        both have a loss, in the median, so that one with few learning rates does not bend the curve, nor one that is
        far off at a rate where seeds part."""
        fullest = max(sorted(self.by_seed), key=lambda seed: len(self.by_seed[seed]))
        off = {}
        for seed, row in self.by_seed.items():
            differences = [loss - self.by_seed[fullest].get(lr, math.nan) for lr, loss in row.items()]
            off[seed] = median([each for each in differences if math.isfinite(each)] or [0.0])
        shared = mean(off.values())
        return tuple(
            shared + mean(row[lr] - off[seed] for seed, row in self.by_seed.items() if lr in row) for lr in self.lrs
        )

    @property
    def errors(self) -> tuple[float, ...]:
        """Standard errors of the losses over seeds; NaN for a single one."""
        return tuple(standard_error([row[lr] for row in self.by_seed.values() if lr in row]) for lr in self.lrs)

    def rise(self, lr: float) -> tuple[float, float]:
        """The loss at a learning rate less the lowest one, and the standard error of that over seeds: equal seeds
        have equal data and draws, so that differences are taken seed by seed."""
        best = self.lrs[self.best]
        if lr == best:
            return 0.0, 0.0
        differences = [row[lr] - row[best] for row in self.by_seed.values() if lr in row and best in row]
        return self.at(lr) - self.losses[self.best], standard_error(differences)

    @property
    def best(self) -> int:
        return min(range(len(self.losses)), key=lambda index: self.losses[index])

    @property
    def at_edge(self) -> bool:
        """Whether the lowest loss is at an end of the grid, so that the optimum may lie beyond."""
        return self.best in (0, len(self.lrs) - 1)

    @cached_property  # least squares may differ in the last digit from call to call
    def optimum(self) -> float:
        """log2 of the best learning rate: the vertex of the parabola that fits the points within an octave of the
        lowest one best, if it has one among them; else that point."""
        at = [math.log2(lr) for lr in self.lrs]
        best = at[self.best]
        near = [(x, y) for x, y in zip(at, self.losses, strict=True) if abs(x - best) < 1.01 and math.isfinite(y)]
        x = torch.tensor([x - best for x, _ in near], dtype=torch.float64)
        y = torch.tensor([y for _, y in near], dtype=torch.float64)
        if not (x.min() < 0 < x.max()):
            return best
        powers = torch.stack([torch.ones_like(x), x, x.square()], 1)
        _, slope, bend = map(float, torch.linalg.lstsq(powers, y[:, None]).solution)
        if bend <= 0 or not float(x.min()) < -slope / (2 * bend) < float(x.max()):
            return best
        return best - slope / (2 * bend)

    @property
    def flat(self) -> tuple[float, float]:
        """log2 of the learning rates around the lowest point between which the loss, interpolated, is at most FLAT
        above it, up to where it first rises above (a rate that diverged is no end: the last before it is); infinite
        where the grid ends first, so that how far the curve is flat is not known."""
        return self._flat_to(-1), self._flat_to(1)

    def _flat_to(self, way: int) -> float:
        ceiling = self.losses[self.best] + FLAT
        here = self.best
        while 0 <= here + way < len(self.lrs):
            if self.losses[here + way] > ceiling:
                share = (ceiling - self.losses[here]) / (self.losses[here + way] - self.losses[here])
                return math.log2(self.lrs[here]) + share * math.log2(self.lrs[here + way] / self.lrs[here])
            here += way
        return way * math.inf

    def alone(self, seed: int) -> Curve:
        """The curve of one of its seeds."""
        row = self.by_seed[seed]
        return Curve(self.parametrization, self.width, tuple(sorted(row)), {seed: row})

    def at(self, lr: float) -> float:
        """The loss at a learning rate of the grid."""
        return self.losses[self.lrs.index(lr)]


@dataclass(frozen=True)
class Transfer:
    """From the base width to another: ``shift`` of the optimum in octaves, ``regret`` in nats (the loss at the base
    width's best learning rate, less the best of the grid), both with standard errors over seeds, NaN where there is
    one; ``flat`` the range around the lowest point, in octaves from the base width's optimum as the shift is, in which
    the loss is at most FLAT above the lowest, infinite where the grid ends before; ``beyond`` where the grid ends
    before that learning rate, and the regret is that of its nearest end, which is less if the loss rises on;
    ``sensitivity`` (the rise of the loss one octave off the optimum, the mean of both sides)."""

    parametrization: str
    width: int
    best_lr: float
    best_loss: float
    shift: float
    shift_error: float
    regret: float
    regret_error: float
    flat: tuple[float, float]
    beyond: bool
    sensitivity: float
    at_edge: bool
    diverged: int


def standard_error(values: Sequence[float]) -> float:
    """Of the mean; NaN for a single value, or where one is infinite."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 and all(map(math.isfinite, values)) else math.nan


def curves(entries: Iterable[Mapping[str, Any]]) -> list[Curve]:
    """All curves of a results file. At the base width all parametrizations of one model (of the same options and the
    same multipliers of learning rates) are the same, so that each has there what any of them was run at."""
    points: dict[tuple[str, int], dict[int, dict[float, float]]] = defaultdict(lambda: defaultdict(dict))
    models: dict[str, str] = {}  # by parametrization
    base = 0
    for entry in entries:
        loss = math.inf if entry["diverged"] is not None else entry["loss"]
        points[entry["parametrization"], entry["width"]][entry["seed"]][entry["lr"]] = loss
        options, rates = entry.get("request", {}).get("options", ()), entry.get("lr_multipliers")
        models[entry["parametrization"]] = repr((options, sorted((rates or {}).items())))
        base = entry["sizes"]["width"]
    shared: dict[str, dict[int, dict[float, float]]] = defaultdict(lambda: defaultdict(dict))
    for name, model in models.items():
        for seed, row in points.get((name, base), {}).items():
            shared[model][seed] |= row
    points |= {(name, base): dict(shared[model]) for name, model in models.items() if shared[model]}
    return [
        Curve(name, width, tuple(sorted({lr for row in by_seed.values() for lr in row})), by_seed)
        for (name, width), by_seed in sorted(points.items())
    ]


def transfers(entries: Iterable[Mapping[str, Any]]) -> list[Transfer]:
    """For each parametrization and width, what transferring from the base width means; NaN where no run is of it."""
    entries = list(entries)
    base_width = entries[0]["sizes"]["width"] if entries else 0
    found = []
    grouped: dict[str, list[Curve]] = defaultdict(list)
    for curve in curves(entries):
        if any(map(math.isfinite, curve.losses)):
            grouped[curve.parametrization].append(curve)
    for name, family in grouped.items():
        base = next((curve for curve in family if curve.width == base_width), None)
        tuned, optimum = (base.lrs[base.best], base.optimum) if base else (math.nan, math.nan)
        for curve in family:
            best = curve.best
            nearest = min(max(tuned, curve.lrs[0]), curve.lrs[-1]) if base else math.nan
            regret, error = curve.rise(nearest) if nearest in curve.lrs else (math.nan, math.nan)
            found.append(
                Transfer(
                    name,
                    curve.width,
                    curve.lrs[best],
                    curve.losses[best],
                    curve.optimum - optimum,
                    _shift_error(curve, base) if base else math.nan,
                    regret,
                    error,
                    (curve.flat[0] - optimum, curve.flat[1] - optimum),
                    base is not None and nearest != tuned,
                    _sensitivity(curve),
                    curve.at_edge,
                    sum(map(math.isinf, curve.losses)),
                )
            )
    return found


def _shift_error(curve: Curve, base: Curve) -> float:
    """Over the seeds that have an optimum of their own at both widths: three learning rates at least."""
    if curve is base:
        return 0.0
    common = [seed for seed in curve.by_seed if min(len(each.by_seed.get(seed, ())) for each in (curve, base)) >= 3]
    return standard_error([curve.alone(seed).optimum - base.alone(seed).optimum for seed in common])


def _sensitivity(curve: Curve) -> float:
    """Both neighbours one octave from the lowest point, where the grid has them."""
    center = curve.lrs[curve.best]
    rises = []
    for factor in (0.5, 2.0):
        near = min(curve.lrs, key=lambda lr: abs(math.log2(lr / (center * factor))))
        if abs(math.log2(near / (center * factor))) < 0.1:
            rises.append(curve.at(near) - curve.losses[curve.best])
    return mean(rises) if rises else math.nan
