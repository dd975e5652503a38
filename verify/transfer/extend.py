"""What results say of runs to add: where the base width's optimum is, and which optima lie beyond a grid's ends."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from widthwise.verify.transfer.config import Run, Sweep
from widthwise.verify.transfer.metrics import Curve, curves


def tuned_rates(sweep: Sweep, finished: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The best learning rate at the base width by parametrization, for the first seed, where its runs are finished."""
    seed = sweep.seeds[0]
    base = [run for run in sweep.runs() if (run.width, run.seed) == (sweep.base_width, seed)]
    ready = {run.parametrization for run in base} - {run.parametrization for run in base if run.key not in finished}
    tuned = {}
    for name in sweep.parametrizations:
        kin = sweep.run(name, sweep.base_width, 1.0, seed).parametrization
        own = [finished[run.key] for run in base if run.parametrization == kin and kin in ready]
        if any(entry["loss"] is not None for entry in own):
            (curve,) = curves(own)
            tuned[name] = curve.lrs[curve.best]
    return tuned


def further(sweep: Sweep, planned: Sequence[Run], entries: Iterable[Mapping[str, Any]]) -> Iterator[Run]:
    """Runs to add to those planned, given their results; none where ``sweep.extend`` is 0.

    A curve whose lowest loss is at an end is continued there by two learning rates, spaced as its last two, and by at
    most ``sweep.extend`` in all. Every curve then gets the learning rate that was the best at the base width.
    """
    if not sweep.extend:
        return
    tuned: dict[str, float] = {}
    for curve in sorted(curves(entries), key=lambda curve: curve.width != sweep.base_width):
        if curve.parametrization not in sweep.parametrizations or math.isinf(min(curve.losses)):
            continue
        kin = sweep.run(curve.parametrization, curve.width, 1.0, 0)  # at the base width, another's name
        mine = [run for run in planned if (run.parametrization, run.width) == (kin.parametrization, kin.width)]
        lrs = _beyond(curve, {run.lr for run in mine}, sweep.extend)
        if curve.width != sweep.base_width:
            lrs += [lr for lr in (tuned.get(curve.parametrization),) if lr is not None]
        elif not lrs:
            tuned[curve.parametrization] = curve.lrs[curve.best]
        for lr in lrs:
            for seed in sorted({run.seed for run in mine}):
                yield sweep.run(curve.parametrization, curve.width, lr, seed)


def _beyond(curve: Curve, grid: set[float], most: int) -> list[float]:
    """Two more learning rates at the end where the lowest loss is, unless there are as many as may be."""
    lrs = curve.lrs
    if not curve.at_edge or len(lrs) < 2 or not grid:
        return []
    if curve.best == 0:
        added, ratio, end = sum(lr < min(grid) for lr in lrs), lrs[0] / lrs[1], lrs[0]
    else:
        added, ratio, end = sum(lr > max(grid) for lr in lrs), lrs[-1] / lrs[-2], lrs[-1]
    return [end * ratio ** (step + 1) for step in range(min(2, most - added))]
