"""How much sooner the first of many channels gets away in a wider model: the engine's integral beside plain draws.

    python bench/transfer/escape.py [--draws 1000000]        # a quarter of an hour on one CPU core

`--assume largest-channel` counts factors: a product of p of them gets away after a time ∝ (ln N)^-(p-2)/2. SiLU is no
factor, but steeper than its input where that is of order one. So `--assume first-channel` integrates the gradient flow
of each product (widthwise.derive.escape). Here the same flow is followed from plain draws of the factors at the scales
that models begin with (taps 0.58 in all, the rest 1), and the median time of the first of N, N = 192 to 3072, is read
off: octaves of the stable learning rate, and the power of ln N that they are between the two ends, ± what a count of
so many draws leaves of it.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import silu

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from widthwise.derive.escape import first_away
from widthwise.derive.laws import NORMAL, ONES, TAPS, begins
from widthwise.derive.product import Applied, Factor, Product, product

AWAY, STEP = 60.0, 0.01
CHANNELS = (192, 768, 1536, 3072)

A, B, C, D, E = (Factor(name, name, NORMAL) for name in "abcde")
TAP, TAP_TOO, GAIN = Factor("tap", "tap", TAPS), Factor("tap_too", "tap_too", TAPS), Factor("gain", "gain", ONES)


def by_silu(*parts: Factor) -> Applied:
    return Applied("silu", product(*parts))


Drawn = Callable[[Tensor], Tensor]
CASES: tuple[tuple[str, Product, Sequence[Factor], Drawn], ...] = (  # a tree, and the same as a function of its factors
    ("3 factors", product(A, B, C), (A, B, C), lambda x: x.prod(1)),
    ("4 factors", product(A, B, C, D), (A, B, C, D), lambda x: x.prod(1)),
    ("5 factors", product(A, B, C, D, E), (A, B, C, D, E), lambda x: x.prod(1)),
    (
        "q·k, both by SiLU",
        product(by_silu(A, TAP), by_silu(B, TAP_TOO)),
        (A, TAP, B, TAP_TOO),
        lambda x: silu(x[:, 0] * x[:, 1]) * silu(x[:, 2] * x[:, 3]),
    ),
    (
        "v and the gate by SiLU, W_o",
        product(by_silu(A, TAP), by_silu(B), C),
        (A, TAP, B, C),
        lambda x: silu(x[:, 0] * x[:, 1]) * silu(x[:, 2]) * x[:, 3],
    ),
    (
        "the same with a gain, which begins at 1",
        product(by_silu(A, TAP), by_silu(B), C, GAIN),
        (A, TAP, B, C, GAIN),
        lambda x: silu(x[:, 0] * x[:, 1]) * silu(x[:, 2]) * x[:, 3] * x[:, 4],
    ),
    ("the MLP, one by SiLU", product(by_silu(A), B, C), (A, B, C), lambda x: silu(x[:, 0]) * x[:, 1] * x[:, 2]),
)


def begin(order: Sequence[Factor], draws: int, generator: torch.Generator) -> Tensor:
    """Draws of factors as models begin, [draws, factors]."""
    mean, std = (torch.tensor(each, dtype=torch.float64) for each in zip(*(begins(f.law) for f in order), strict=True))
    return torch.randn(draws, len(order), generator=generator, dtype=torch.float64) * std + mean


def read(drawn: Drawn, x: Tensor) -> tuple[Tensor, Tensor]:
    """Each draw's product, and its slopes by its factors."""
    at = x.detach().requires_grad_()
    products = drawn(at)
    (slopes,) = torch.autograd.grad(products.sum(), at)
    return products.detach(), slopes


def first(drawn: Drawn, x: Tensor) -> Tensor:
    """The times, in order, after which draws are away under dx/dt = ∂product/∂x, by steps whose length grows with x."""
    times, t = [], torch.zeros(len(x), dtype=x.dtype)
    gone = 0
    most = 0.05 * len(x)
    while gone < most:  # the first of 192 is among the first hundredth
        length = STEP * (0.3 + x.norm(dim=1, keepdim=True))
        _, trial = read(drawn, x)
        _, ahead = read(drawn, x + 0.5 * length * trial / trial.norm(dim=1, keepdim=True).clamp_min(1e-30))
        speed = ahead.norm(dim=1, keepdim=True).clamp_min(1e-30)
        x, t = x + length * ahead / speed, t + (length / speed).squeeze(1)
        away = x.abs().amax(1) > AWAY
        times.append(t[away])
        gone += int(away.sum())
        stays = ~away & (t < 1e4)  # what has come to rest, where SiLU is flat, stays
        x, t = x[stays], t[stays]
    return torch.cat(times).sort().values


def octaves(times: Sequence[float]) -> str:
    return " | ".join(f"{math.log2(each / times[0]):+.2f}" for each in times)


def power(times: Sequence[float]) -> float:
    return math.log(times[-1] / times[0]) / math.log(math.log(CHANNELS[-1]) / math.log(CHANNELS[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=1_000_000)
    draws = parser.parse_args().draws
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    head = " | ".join(map(str, CHANNELS))
    print(f"| channels | {head} | power of ln N | drawn: {head} | power |\n| --- |" + " ---: |" * 10)
    for name, tree, order, drawn in CASES:
        away = first(drawn, begin(order, draws, generator))
        ranks = [(1 - 0.5 ** (1 / many)) * draws for many in CHANNELS]
        at = [float(away[int(rank)]) for rank in ranks]
        # of the rarest quantile, by one standard deviation of its rank
        noise = abs(power(at) - power([at[0], float(away[int(ranks[-1] + math.sqrt(ranks[-1]))])]))
        derived = [first_away(tree, many) for many in CHANNELS]
        row = f"{octaves(derived)} | {power(derived):.2f} | {octaves(at)} | {power(at):.2f} ± {noise:.2f}"
        print(f"| {name} | {row} |", flush=True)


if __name__ == "__main__":
    main()
