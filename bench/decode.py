"""The decode step on one GPU: microseconds eager and in a CUDA graph, beside FLA's where it is installed.

    python bench/decode.py [--variants] [--output FILE]

``--variants`` also times other block sizes than ``triton_step.blocks`` chooses. Every row is printed, and appended to
FILE, as soon as it is measured. Floor: bytes, the state read and written once, over the bandwidth of a copy, which is
measured first. FLA, unlike ours, reads the state and writes a new one with V innermost as well.
"""

import argparse
import functools
import itertools
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from torch import Tensor

from widthwise.kernels import gated_delta_rule_reference, gated_delta_rule_step, triton_step

# B, H, HV, K, V: shipped models' heads at several batches, then the published model's
SHAPES = [
    (64, 16, 16, 128, 128),
    (1, 16, 16, 128, 128),
    (8, 16, 32, 128, 128),
    (256, 16, 32, 128, 128),
    (64, 6, 6, 32, 64),
    (64, 6, 6, 192, 384),
    (64, 6, 6, 256, 512),
]
L2_BYTES = 256 << 20  # written between eager calls and held by rotating states, so that no state is found in the L2


def inputs(B: int, H: int, HV: int, K: int, V: int) -> tuple[list[Tensor], list[Tensor]]:
    """q, k, v, g, beta of a token, and as many states as keep the L2 cold when taken in turn (at least two)."""
    torch.manual_seed(0)
    q, k = (torch.randn(B, H, K, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    v = torch.randn(B, HV, V, device="cuda", dtype=torch.bfloat16)
    g, beta = -0.2 * torch.rand(B, HV, device="cuda"), torch.rand(B, HV, device="cuda", dtype=torch.bfloat16)
    copies = min(max(2, L2_BYTES // (4 * B * HV * K * V)), 64)
    return [q, k, v, g, beta], [torch.randn(B, HV, K, V, device="cuda") for _ in range(copies)]


def in_graph(step: Callable[[Tensor], object], states: list[Tensor], replays: int = 30) -> float:
    """Microseconds a step: one graph steps through every state once; median of replays."""
    step(states[0])
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for state in states[:2]:
            step(state)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for state in states:
            step(state)
    return measured(graph.replay, replays) / len(states)


def eager(step: Callable[[Tensor], object], states: list[Tensor], repeats: int = 30) -> float:
    """Microseconds a step, called from Python in a row, the launches' cost included where it is not hidden."""

    def once_each() -> None:
        for state in states:
            step(state)

    once_each()
    return measured(once_each, max(3, repeats * 2 // len(states))) / len(states)


def measured(function: Callable[[], object], repeats: int) -> float:
    taken = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        taken.append(1e3 * start.elapsed_time(end))
    return statistics.median(taken)


def bandwidth() -> float:
    """Bytes a microsecond that a large copy moves, reads and writes counted."""
    source = torch.empty(1 << 28, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.nbytes / measured(lambda: target.copy_(source), 10)


def theirs() -> Callable[..., object] | None:
    try:
        from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule
    except ImportError:
        return None

    def step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> object:
        tokens = [x.unsqueeze(1) for x in (q, k, v, g, beta)]
        return fused_recurrent_gated_delta_rule(
            *tokens, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True
        )

    return step


def row(shape: tuple[int, ...], rate: float, fla: Callable[..., object] | None) -> str:
    tokens, states = inputs(*shape)

    def ours(state: Tensor) -> object:
        return gated_delta_rule_step(*tokens, state, normalize_qk=True)

    found = gated_delta_rule_step(*tokens, states[0], normalize_qk=True)
    few = [x[:2].unsqueeze(1) for x in tokens]
    o, last = gated_delta_rule_reference(*few, initial_state=states[0][:2], output_final_state=True, normalize_qk=True)
    wrong = [float((a[:2] - b).norm() / b.norm()) for a, b in zip(found, (o.squeeze(1), last), strict=True)]
    del found
    graph = in_graph(ours, states)
    cells = [f"{2 * states[0].nbytes / rate:.1f}", f"{graph:.1f}", f"{eager(ours, states):.1f}"]
    if fla is None:
        cells += ["–"] * 3
    else:

        def peer(state: Tensor) -> object:
            return fla(*tokens, state)

        their_graph = in_graph(peer, states)
        cells += [f"{their_graph:.1f}", f"{eager(peer, states):.1f}", f"{their_graph / graph:.2f}"]
    return f"| {shape} | {' | '.join(cells)} | {wrong[0]:.1e}, {wrong[1]:.1e} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()

    def say(line: str) -> None:
        print(line, flush=True)
        if options.output is not None:
            with options.output.open("a") as file:
                file.write(line + "\n")

    rate, fla = bandwidth(), theirs()
    say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}, ")
    say(f"copy {rate * 1e-6:.2f} TB/s; bf16 q, k, v, beta, the norm inside; µs a step\n")
    say("| (B, H, HV, K, V) | floor | ours, graph | eager | FLA, graph | eager | FLA / ours | error of o, state |")
    say("|---|---|---|---|---|---|---|---|")
    for shape in SHAPES:
        say(row(shape, rate, fla))
    if options.variants:
        variants(say)


def variants(say: Callable[[str], None]) -> None:
    say("\n| (B, H, HV, K, V) | BLOCK_V | warps | µs in a graph |\n|---|---|---|---|")
    chosen = triton_step.blocks
    for shape in SHAPES[:2] + SHAPES[4:]:
        tokens, states = inputs(*shape)
        block_k, widest = (triton.next_power_of_2(width) for width in shape[3:])
        step = functools.partial(gated_delta_rule_step, *tokens, normalize_qk=True)
        for block_v, warps in itertools.product((16, 32, 64, 128), (1, 2, 4, 8)):
            if block_v <= widest and 8 <= block_k * block_v // (32 * warps) <= 128:
                blocks = {"BLOCK_K": block_k, "BLOCK_V": block_v, "num_warps": warps}
                triton_step.blocks = lambda *_, blocks=blocks: blocks
                say(f"| {shape} | {block_v} | {warps} | {in_graph(step, states):.1f} |")
    triton_step.blocks = chosen


if __name__ == "__main__":
    main()
