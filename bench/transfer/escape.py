"""How much sooner the first of many channels gets away in a wider model, with SiLU between the factors.

    python bench/transfer/escape.py        # three minutes on one CPU core

`--assume largest-channel` counts factors: a product of p of them gets away after a time ∝ (ln N)^-(p-2)/2. SiLU is no
factor, but steeper than its input where that is of order one. So the gradient flow of one channel's product is
integrated from many draws of its factors at the scales that models begin with (taps 0.58 in all, the rest 1), and the
median time of the first of N, N = 192 to 3072, is read off: octaves of the stable learning rate, and the power of ln N
that they are between the two ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import silu

DRAWS, AWAY, STEP = 200_000, 60.0, 0.01
CHANNELS = (192, 768, 1536, 3072)
TAPS = 0.58  # rms of four taps that begin uniform in ±1/2

Product = Callable[[Tensor], Tensor]
CASES: tuple[
    tuple[str, Product, Sequence[float], Sequence[float]], ...
] = (  # product of x, and how x begins: std, mean
    ("3 factors", lambda x: x.prod(1), (1, 1, 1), (0, 0, 0)),
    ("4 factors", lambda x: x.prod(1), (1, 1, 1, 1), (0, 0, 0, 0)),
    ("5 factors", lambda x: x.prod(1), (1, 1, 1, 1, 1), (0, 0, 0, 0, 0)),
    ("q·k, both by SiLU", lambda x: silu(x[:, 0] * x[:, 1]) * silu(x[:, 2] * x[:, 3]), (1, TAPS, 1, TAPS), (0,) * 4),
    (
        "v and the gate by SiLU, W_o",
        lambda x: silu(x[:, 0] * x[:, 1]) * silu(x[:, 2]) * x[:, 3],
        (1, TAPS, 1, 1),
        (0,) * 4,
    ),
    (
        "the same with a gain, which begins at 1",
        lambda x: silu(x[:, 0] * x[:, 1]) * silu(x[:, 2]) * x[:, 3] * x[:, 4],
        (1, TAPS, 1, 1, 0),
        (0, 0, 0, 0, 1),
    ),
    ("the MLP, one by SiLU", lambda x: silu(x[:, 0]) * x[:, 1] * x[:, 2], (1, 1, 1), (0, 0, 0)),
)


def slope(product: Product, x: Tensor) -> Tensor:
    with torch.enable_grad():
        at = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(product(at).sum(), at)
    return gradient


def first(product: Product, x: Tensor) -> Tensor:
    """The times, in order, after which draws are away under dx/dt = ∂product/∂x, by steps whose length grows with x."""
    times, t = [], torch.zeros(len(x), dtype=x.dtype)
    gone = 0
    while gone < 0.05 * DRAWS:  # the first of 192 is among the first hundredth
        length = STEP * (0.3 + x.norm(dim=1, keepdim=True))
        trial = slope(product, x)
        ahead = slope(product, x + 0.5 * length * trial / trial.norm(dim=1, keepdim=True).clamp_min(1e-30))
        speed = ahead.norm(dim=1, keepdim=True).clamp_min(1e-30)
        x, t = x + length * ahead / speed, t + (length / speed).squeeze(1)
        away = x.abs().amax(1) > AWAY
        times.append(t[away])
        gone += int(away.sum())
        stays = ~away & (t < 1e4)  # what has come to rest, where SiLU is flat, stays
        x, t = x[stays], t[stays]
    return torch.cat(times).sort().values


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print("| channels | " + " | ".join(map(str, CHANNELS)) + " | power of ln N |\n| --- |" + " ---: |" * 5)
    for name, product, std, mean in CASES:
        scale, begins = (torch.tensor(each, dtype=torch.float64) for each in (std, mean))
        times = first(product, torch.randn(DRAWS, len(std), dtype=torch.float64) * scale + begins)
        at = [float(times[int((1 - 0.5 ** (1 / many)) * DRAWS)]) for many in CHANNELS]
        power = math.log(at[-1] / at[0]) / math.log(math.log(CHANNELS[-1]) / math.log(CHANNELS[0]))
        octaves = " | ".join(f"{math.log2(each / at[0]):+.2f}" for each in at)
        print(f"| {name} | {octaves} | {power:.2f} |", flush=True)


if __name__ == "__main__":
    main()
