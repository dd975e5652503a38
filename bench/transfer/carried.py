"""What a sum over channels of products costs in curvature once gradient flow has fitted it: which channels carry it?

    python bench/transfer/carried.py        # half a minute on one CPU core

f = 1/N Σ_c Π_i x_ic with x as models begin follows the gradient flow of f until it has risen by 1 (to 0.99): every
factor of every channel at a rate of N, by which a channel's own speed does not know of N (mean-field, as SGD's rules
have it). Reported of where it arrives: the rate times curvature along the gradient, N Σ |∂f/∂x|², of which SGD stands
no more than a constant; and the number of channels that carry the sum, (Σ|m|)² / Σ m². If one channel carries it, its p
factors are N^(1/p) and curvature is p N^(1-2/p). Medians of five seeds; the slope is that of ln curvature in ln N. Last
comes what the engine goes by (widthwise.derive.carrier): what part of the rise the channel has that has most of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

import torch
from escape import CASES, GAIN, TAP, A, B, C, Drawn, begin, by_silu, read
from torch.nn.functional import silu

from widthwise.derive.carrier import share
from widthwise.derive.product import Factor, Product, degree, product

CHANNELS = (256, 1024, 4096, 16384)
SEEDS, GOAL, STEP, LATEST = 5, 0.99, 0.02, 50.0
MORE: tuple[tuple[str, Product, Sequence[Factor], Drawn], ...] = (
    (
        "DeltaNet behind W_o: v by SiLU, a gain",
        product(by_silu(A, TAP), B, GAIN),
        (A, TAP, B, GAIN),
        lambda x: silu(x[:, 0] * x[:, 1]) * x[:, 2] * x[:, 3],
    ),
    (
        "gated linear attention: the gate by SiLU, a gain",
        product(A, by_silu(B), C, GAIN),
        (A, B, C, GAIN),
        lambda x: x[:, 0] * silu(x[:, 1]) * x[:, 2] * x[:, 3],
    ),
)


def arrive(drawn: Drawn, order: Sequence[Factor], channels: int, seed: int) -> tuple[float, float]:
    """(curvature, channels that carry the sum) where the flow arrives."""
    x = begin(order, channels, torch.Generator().manual_seed(seed))
    products, slopes = read(drawn, x)
    before, elapsed = float(products.mean()), 0.0
    while (left := before + 1 - float(products.mean())) > 1 - GOAL and elapsed < LATEST:
        time = STEP / float((slopes.abs() / (x.abs() + 0.3)).max())  # by no more than a fiftieth of any factor
        time = min(time, 0.3 * left / float(slopes.square().sum() / channels))  # nor past the goal
        x, elapsed = x + time * slopes, elapsed + time
        products, slopes = read(drawn, x)
    carriers = float(products.abs().sum() ** 2 / products.square().sum())
    return float(slopes.square().sum() / channels), carriers


def main() -> None:
    torch.set_num_threads(1)
    head = " | ".join(map(str, CHANNELS))
    print(f"| | {head} | slope | 1 - 2/p | one of 256 has |\n| --- |" + " ---: |" * (len(CHANNELS) + 3))
    two = ("2 factors", product(A, B), (A, B), lambda x: x.prod(1))
    for name, tree, order, drawn in (two, *CASES, *MORE):
        found = [[arrive(drawn, order, channels, seed) for seed in range(SEEDS)] for channels in CHANNELS]
        curvature = [median(each[0] for each in runs) for runs in found]
        carriers = [median(each[1] for each in runs) for runs in found]
        slope = math.log(curvature[-1] / curvature[0]) / math.log(CHANNELS[-1] / CHANNELS[0])
        cells = " | ".join(f"{at:.3g}; {by:.3g}" for at, by in zip(curvature, carriers, strict=True))
        print(f"| {name} | {cells} | {slope:+.2f} | {1 - 2 / degree(tree):.2f} | {share(tree):.2f} |", flush=True)


if __name__ == "__main__":
    main()
