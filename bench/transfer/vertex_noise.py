"""How sure a shift of the optimum is that rests on one seed: the losses of a sweep, drawn anew with noise.

    python bench/transfer/vertex_noise.py docs/results/transfer/head-dim-fixed-sgd.jsonl

First what two seeds of one rule differ by within an octave of the lowest loss (once their mean difference is taken off,
over √2), then each width's vertex and its shift from the base width, ± the standard deviation over draws; and the same
shift by other fits: through the lowest point and its two neighbours alone, and over the learning rates alone that every
seed of both widths has.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from pathlib import Path
from statistics import stdev

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from widthwise.verify.transfer.metrics import Curve, curves
from widthwise.verify.transfer.results import Results

DRAWS = 300


def spread(curve: Curve, noise: float) -> float:
    """The standard deviation of the vertex when every loss has so much noise."""
    losses = dict(zip(curve.lrs, curve.losses, strict=True))
    drawn = [
        Curve("", 0, curve.lrs, {0: {lr: loss + random.gauss(0, noise) for lr, loss in losses.items()}}).optimum
        for _ in range(DRAWS)
    ]
    return stdev(drawn)


def three_points(curve: Curve) -> float:
    """The vertex of the parabola through the lowest point and its neighbours; that point where it has but one."""
    if curve.at_edge:
        return math.log2(curve.lrs[curve.best])
    at = [math.log2(lr) for lr in curve.lrs[curve.best - 1 : curve.best + 2]]
    low, here, high = curve.losses[curve.best - 1 : curve.best + 2]
    left, right = (here - low) / (at[1] - at[0]), (high - here) / (at[2] - at[1])
    return (at[0] + at[1]) / 2 - left * (at[2] - at[0]) / 2 / (right - left)


def in_common(*several: Curve) -> list[Curve]:
    """The curves over the learning rates that all their seeds have."""
    rows = [row for curve in several for row in curve.by_seed.values()]
    lrs = tuple(sorted(set.intersection(*(set(row) for row in rows))))
    return [
        Curve(each.parametrization, each.width, lrs, {k: {lr: v[lr] for lr in lrs} for k, v in each.by_seed.items()})
        for each in several
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--base", type=int, default=128)
    parser.add_argument("--noise", type=float, default=0.007, help="nats, of a loss (of the mean over seeds)")
    options = parser.parse_args()
    random.seed(0)
    found = {(each.parametrization, each.width): each for each in curves(Results(options.sweep).load().values())}
    for (name, width), curve in sorted(found.items()):
        if len(curve.by_seed) > 1:
            one, other = (curve.by_seed[seed] for seed in sorted(curve.by_seed)[:2])
            near = [lr for lr in one if lr in other and abs(math.log2(lr / curve.lrs[curve.best])) < 1.01]
            differences = [one[lr] - other[lr] for lr in near]
            print(f"{name}, {width}: two seeds differ by {stdev(differences) / math.sqrt(2):.4f}")
    base = next(curve for (_, width), curve in found.items() if width == options.base)
    at_base = spread(base, options.noise)
    print(f"base, {options.base}: log2 of the best lr {base.optimum:+.2f} ± {at_base:.2f}")
    for (name, width), curve in sorted(found.items()):
        if width != options.base:
            here, shift = spread(curve, options.noise), curve.optimum - base.optimum
            error = math.hypot(here, at_base)
            begun, ended = in_common(base, curve)
            others = (
                f"by three points {three_points(curve) - three_points(base):+.2f}, over common rates "
                f"{ended.optimum - begun.optimum:+.2f}"
                if len(begun.lrs) > 2
                else ""
            )
            print(f"{name}, {width}: {curve.optimum:+.2f} ± {here:.2f}, shift {shift:+.2f} ± {error:.2f}; {others}")


if __name__ == "__main__":
    main()
