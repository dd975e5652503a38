"""The scan on CPUs against transformers' pure-PyTorch fallback of the same function, in one process, turn by turn.

    python bench/scan_cpu.py [--threads 2] [--repeats 30]

Needs ``transformers`` (any version whose Qwen3-Next has ``torch_chunk_gated_delta_rule``), which the project itself
does not. Prints milliseconds, median and least, for each shape, and by what factor ours is faster.
"""

import argparse
import inspect
import platform
import statistics
import time
from collections.abc import Callable

import torch
import transformers
from torch import Tensor
from transformers.models.qwen3_next import modeling_qwen3_next

from widthwise.kernels import gated_delta_rule

SHAPES = [(4, 512, 4, 32, 64), (8, 256, 6, 24, 48), (1, 2048, 4, 64, 128), (2, 512, 4, 128, 128)]  # B, T, H, K, V

# Undecorated: the decorator may swap in an installed kernel.
theirs = inspect.unwrap(modeling_qwen3_next.torch_chunk_gated_delta_rule)


def inputs(B: int, T: int, H: int, K: int, V: int) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    q, k, v = torch.randn(B, T, H, K), torch.randn(B, T, H, K), torch.randn(B, T, H, V)
    g, beta = -torch.nn.functional.softplus(torch.randn(B, T, H)), torch.rand(B, T, H)
    return [x.requires_grad_() for x in (q, k, v, g, beta)], torch.randn(B, T, H, V)


def run_ours(tokens: list[Tensor]) -> Tensor:
    return gated_delta_rule(*tokens, normalize_qk=True)[0]


def run_theirs(tokens: list[Tensor]) -> Tensor:
    o: Tensor = theirs(*tokens, use_qk_l2norm_in_kernel=True)[0]
    return o


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - start)


def compare(shape: tuple[int, ...], repeats: int) -> None:
    tokens, do = inputs(*shape)
    grads = [torch.autograd.grad(run(tokens), tokens, do) for run in (run_ours, run_theirs)]
    worst = max(relative(a.detach(), b.detach()) for a, b in zip(*grads, strict=True))
    assert worst < 1e-3, f"the two disagree at {shape}: {worst}"

    def forward(run: Callable[[list[Tensor]], Tensor]) -> None:
        with torch.no_grad():
            run(tokens)

    def both(run: Callable[[list[Tensor]], Tensor]) -> None:
        torch.autograd.grad(run(tokens), tokens, do)

    for name, step in (("forward", forward), ("forward+backward", both)):
        times: dict[Callable[[list[Tensor]], Tensor], list[float]] = {run_ours: [], run_theirs: []}
        for repeat in range(repeats + 3):
            for run, taken in times.items():
                elapsed = timed(lambda step=step, run=run: step(run))
                if repeat >= 3:
                    taken.append(elapsed)
        (our_median, our_least), (their_median, their_least) = (
            (statistics.median(taken), min(taken)) for taken in times.values()
        )
        row = f"| {shape} | {name} | {our_median:.1f} | {our_least:.1f} | {their_median:.1f} | {their_least:.1f} |"
        print(f"{row} {their_median / our_median:.2f} | {their_least / our_least:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()},")
    print(f"{options.threads} threads, fp32, norm inside, median of {options.repeats}\n")
    print("| (B, T, H, K, V) | | ours ms | least | transformers ms | least | faster, by medians | by least |")
    print("|---|---|---|---|---|---|---|---|")
    for shape in SHAPES:
        compare(shape, options.repeats)


if __name__ == "__main__":
    main()
