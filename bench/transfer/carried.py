"""What a sum over channels of products costs in curvature once gradient flow has fitted it: which channels carry it?

    python bench/transfer/carried.py        # two minutes on two CPU cores

f = 1/N Σ_c Π_i x_ic with normal x begins near zero and follows the gradient flow of |1 - f| to f = 0.99: every factor
of every channel at a rate of N, by which a channel's own speed does not know of N (mean-field, as SGD's rules have it).
Reported of where it arrives: the rate times curvature along the gradient, N Σ |∂f/∂x|², of which SGD stands no more
than a constant; and the number of channels that carry the sum, (Σ|m|)² / Σ m². If one channel carries it, its factors
are N^(1/p) and curvature is p N^(1-2/p). Medians of five seeds; the slope is that of ln curvature in ln N.
"""

from __future__ import annotations

import math
from statistics import median

import torch
from torch import Tensor

CHANNELS = (256, 1024, 4096, 16384, 65536)
SEEDS, GOAL, STEP = 5, 0.99, 0.02


def slopes(x: Tensor) -> Tensor:
    """∂ Π_i x_i / ∂x_i of each channel, [channels, factors]."""
    factors = range(x.shape[1])
    return torch.stack([x[:, [other for other in factors if other != each]].prod(1) for each in factors], 1)


def arrive(factors: int, channels: int, seed: int) -> tuple[float, float]:
    """(curvature, channels that carry the sum) where the flow arrives."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(channels, factors, generator=generator, dtype=torch.float64)
    while (left := 1 - float(x.prod(1).mean())) > 1 - GOAL:
        slope = slopes(x)
        time = STEP / float((slope.abs() / (x.abs() + 0.3)).max())  # by no more than a fiftieth of any factor
        time = min(time, 0.3 * left / float(slope.square().sum() / channels))  # nor past the goal
        x = x + time * slope
    products = x.prod(1).abs()
    return float(slopes(x).square().sum() / channels), float(products.sum() ** 2 / products.square().sum())


def main() -> None:
    head = " | ".join(f"{each}" for each in CHANNELS)
    print(f"| factors | {head} | slope | 1 - 2/p |\n| --- |" + " ---: |" * (len(CHANNELS) + 2))
    for factors in (2, 3, 4, 5):
        found = [[arrive(factors, channels, seed) for seed in range(SEEDS)] for channels in CHANNELS]
        curvature = [median(each[0] for each in runs) for runs in found]
        carriers = [median(each[1] for each in runs) for runs in found]
        slope = math.log(curvature[-1] / curvature[0]) / math.log(CHANNELS[-1] / CHANNELS[0])
        cells = " | ".join(f"{at:.3g}; {by:.3g}" for at, by in zip(curvature, carriers, strict=True))
        print(f"| {factors} | {cells} | {slope:+.2f} | {1 - 2 / factors:.2f} |", flush=True)


if __name__ == "__main__":
    main()
