"""The scan against its peers: right first, then CUDA-event medians, eager and in a CUDA graph.

    python bench/scan.py                     ours alone
    python bench/scan.py --peers             with flash-linear-attention and FlashQLA, where they are installed
    python bench/scan.py --only 1 --names flashqla   one row, one implementation, in a process of its own
    python bench/scan.py --compile 0/4       fill the peers' compile caches, a quarter of what FLA may choose from and
                                             of the rows of FlashQLA (with --only, for some rows)
    python bench/scan.py --first             seconds to the first forward+backward, compile cache empty
    python bench/scan.py --launches          the medians of our own launches, in µs, by the profiler

Every implementation runs in this process on the same inputs through its own public function and autograd. A peer that
fails leaves its message in the table. Times in ms.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import triton
import triton.testing
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from widthwise.kernels import chunked, gated_delta_rule

BF16, FP32 = torch.bfloat16, torch.float32
ROWS = [  # B, T, H, K, V, dtype
    (1, 8192, 16, 128, 128, BF16),
    (2, 8192, 32, 128, 128, BF16),
    (8, 2048, 16, 128, 128, BF16),
    (4, 4096, 16, 128, 128, BF16),
    (1, 32768, 16, 128, 128, BF16),
    (8, 1024, 6, 128, 256, BF16),
    (8, 1024, 6, 192, 384, BF16),
    (32, 1024, 6, 32, 64, BF16),
    (1, 8192, 16, 128, 128, FP32),
]
PEERS = ("fla", "flashqla")
LAST = 8  # FLA's backward has met an illegal memory access here, which ends the process
Implementation = Callable[..., Tensor]


def widthwise(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    return gated_delta_rule(q, k, v, g, beta, normalize_qk=True)[0]


def ceilings() -> tuple[float, float]:
    """(bytes/s of a large copy, FLOP/s of a large bf16 product) as measured on the chips this has run on."""
    return (4.3e12, 790e12) if "H200" in torch.cuda.get_device_name() else (3.0e12, 700e12)


def peers(names: list[str]) -> dict[str, Implementation]:
    """Those asked for and installed.

    FLA refuses its backward on this Triton and Hopper; its guard is lifted, its error reported. It hands calls to
    FlashQLA and TileLang where those are installed, which must be off to see FLA's own kernels.
    FlashQLA's L2 norms are ``torch.compile``d, a variant a shape; past Dynamo's usual limit of eight they would run
    uncompiled, at twice the cost of its forward.
    """
    os.environ.update(FLA_FLASH_QLA="0", FLA_TILELANG="0", FLA_CACHE_RESULTS="0")
    torch._dynamo.config.recompile_limit = 64
    found: dict[str, Implementation] = {}
    try:
        if "fla" not in names:
            raise ImportError("not asked for")
        import fla.ops.common.chunk_o as guarded
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule as fla_rule

        guarded.TRITON_ABOVE_3_7_1 = True
        timing, whole = triton.testing, triton.testing.do_bench  # hundreds of configurations: a fifth of the time each
        timing.do_bench = lambda call, quantiles: whole(call, warmup=5, rep=20, quantiles=quantiles)
        found["fla"] = lambda *x: fla_rule(*x, use_qk_l2norm_in_kernel=True)[0]
    except ImportError as error:
        print("no fla:", error, flush=True)
    try:
        if "flashqla" not in names:
            raise ImportError("not asked for")
        leave_unchecked()
        from flash_qla import chunk_gated_delta_rule as qla_rule

        found["flashqla"] = lambda *x: qla_rule(*x, use_qk_l2norm_in_kernel=True)[0]
    except ImportError as error:
        print("no flashqla:", error, flush=True)
    return found


def leave_unchecked() -> None:
    """TileLang's check for buffers read before they are written does not see that FlashQLA's backward reads its own
    from the second iteration on only, and refuses it."""
    import tilelang

    whole, check = tilelang.jit, tilelang.PassConfigKey.TL_DISABLE_BUFFER_INIT_CHECK

    def unchecked(function: Callable[..., object] | None = None, **options: dict) -> object:
        options["pass_configs"] = {**(options.get("pass_configs") or {}), check: True}
        return whole(function, **options)

    tilelang.jit = unchecked


def draw(batch: int, length: int, heads: int, key_dim: int, value_dim: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v, g, beta and do, fresh; gates like a trained model's, between 0.9 and 1."""
    wide = [torch.randn(batch, length, heads, d, device="cuda").to(dtype) for d in (key_dim, key_dim, value_dim)]
    g = -0.1 * torch.rand(batch, length, heads, device="cuda")
    beta = torch.rand(batch, length, heads, device="cuda")
    return [*(x.requires_grad_() for x in (*wide, g, beta)), torch.randn_like(wide[2])]


def floor(batch: int, length: int, heads: int, key_dim: int, value_dim: int, dtype: torch.dtype) -> tuple[float, float]:
    """The least ms, forward and forward+backward: each input read and each output written once, or the arithmetic of
    a chunked scan (chunk 64; the backward has 2.5 times the forward's) at the matrix units' rate."""
    size, tokens = dtype.itemsize, batch * length * heads
    forward = size * (2 * key_dim + 2 * value_dim) + 8
    backward = size * (4 * key_dim + 3 * value_dim) + 16
    flops = 2 * (3 * key_dim * value_dim + 64 * (2 * key_dim + 2 * value_dim) / 2)
    bandwidth, rate = ceilings()
    rate /= 2 if dtype == FP32 else 1
    ahead = max(forward * tokens / bandwidth, flops * tokens / rate)
    back = max(backward * tokens / bandwidth, 2.5 * flops * tokens / rate)
    return ahead * 1e3, (ahead + back) * 1e3


def median(call: Callable[[], object], budget: float = 0.15) -> float:
    """Median ms of one call by CUDA events, after warm-up."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    repeats = max(10, min(100, int(budget / max(time.perf_counter() - start, 1e-6))))
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for before, after in pairs:
        before.record()
        call()
        after.record()
    torch.cuda.synchronize()
    return sorted(before.elapsed_time(after) for before, after in pairs)[repeats // 2]


def in_graph(call: Callable[[], object]) -> float:
    """The same for replays of a CUDA graph of the call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return median(graph.replay)


def gradients(rule: Implementation, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    o = rule(*inputs[:5])
    return o.detach(), *torch.autograd.grad(o, inputs[:5], inputs[5])


def error(rule: Implementation, inputs: list[Tensor]) -> dict[str, float]:
    """Relative L2 error of o and every gradient, to the chunked path in float64."""
    double = [x.detach().double() for x in inputs]
    rest = (inputs[0].shape[-1] ** -0.5, None, None, True)
    o, _, saved = chunked.forward(*double[:5], *rest)
    wanted = (o, *chunked.backward(double[5], None, *double[:5], *rest, saved)[:5])
    found = gradients(rule, inputs)
    names = ("o", "dq", "dk", "dv", "dg", "dbeta")
    pairs = zip(names, found, wanted, strict=True)
    return {name: float((a.double() - b).norm() / b.norm()) for name, a, b in pairs}


def measure(rule: Implementation, row: tuple, inputs: list[Tensor], peer: bool) -> dict[str, object]:
    batch, length, heads, key_dim, value_dim, dtype = row
    # A peer's error is looked at where its kernels are already compiled, ours on a smaller input as well.
    out: dict[str, object] = {}
    try:
        with torch.no_grad():
            rule(*inputs[:5])
            out["fwd"] = in_graph(lambda: rule(*inputs[:5]))
            out["fwd eager"] = median(lambda: rule(*inputs[:5]))
        gradients(rule, inputs)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gradients(rule, inputs)
        out["extra MiB"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        out["f+b eager"] = median(lambda: gradients(rule, inputs))
        out["f+b"] = in_graph(lambda: gradients(rule, inputs))
        check = inputs if batch * length * heads <= 2**17 else draw(1, 1024, heads, key_dim, value_dim, dtype)
        if not peer or check is inputs:
            out["error"] = {name: float(f"{e:.1e}") for name, e in error(rule, check).items()}
    except Exception as failure:  # a peer may refuse a shape; the table says so
        out["failed"] = f"{type(failure).__name__}: {failure}"[:120]
    return out


def launches(inputs: list[Tensor]) -> dict[str, float]:
    """Median µs of each of our kernels in a forward+backward."""
    from torch.profiler import ProfilerActivity, profile

    for _ in range(3):
        gradients(widthwise, inputs)
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        for _ in range(12):
            gradients(widthwise, inputs)
        torch.cuda.synchronize()
    found: dict[str, list[float]] = {}
    for event in record.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and event.name.endswith("_kernel"):
            found.setdefault(event.name, []).append(event.device_time)
    return {name: round(sorted(times)[len(times) // 2], 1) for name, times in found.items()}


def first_result(row: tuple) -> float:
    """Seconds from having imported to the first gradients, in a fresh process with an empty compile cache."""
    shape = ", ".join(map(str, row[:5]))
    program = (
        f"import sys, time; sys.path.insert(0, {str(Path(__file__).parent)!r}); import torch, scan\n"
        f"x = scan.draw({shape}, {row[5]}); torch.cuda.synchronize(); start = time.perf_counter()\n"
        "scan.gradients(scan.widthwise, x); torch.cuda.synchronize(); print(time.perf_counter() - start)"
    )
    with tempfile.TemporaryDirectory() as cache:
        run = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "TRITON_CACHE_DIR": cache},
            capture_output=True,
            text=True,
            check=True,
        )
    return float(run.stdout.split()[-1])


def fill_caches(part: str, names: list[str], numbers: list[int]) -> None:
    """Compile, in a process of ``part`` = "index/parts", what these peers would compile, without timing anything.

    FlashQLA compiles for a shape: its rows are shared out. FLA tries configurations: each process compiles its share
    of them. Autotuning itself is left to the process that measures.
    """
    from triton.runtime.autotuner import Autotuner

    index, parts = map(int, part.split("/"))

    def compile_only(self: Autotuner, *args: object, config: object, **meta: object) -> list[float]:
        place = self.configs.index(config) if config in self.configs else 0
        if place % parts == index:
            try:
                self.fn.run(*args, **{**meta, **config.all_kwargs(), "warmup": True, "grid": meta["grid"]})  # type: ignore[attr-defined]
            except Exception as failure:
                print("   ", type(failure).__name__, str(failure)[:100], flush=True)
        return [float(place)] * 3

    Autotuner._bench = compile_only
    rules = peers(names)
    for number in numbers:
        row = ROWS[number - 1]
        shortened = (min(row[0], 2), 256, *row[2:])
        for name, rule in rules.items():
            if name == "flashqla" and (number % parts != index or row[3:5] != (128, 128) or row[5] == FP32):
                continue
            if name == "fla" and number in (3, 4, 5):  # compiled for the first row
                continue
            start = time.perf_counter()
            try:
                gradients(rule, draw(*(row if name == "flashqla" else shortened)))
                torch.cuda.synchronize()
            except Exception as failure:
                print("   ", name, type(failure).__name__, str(failure)[:100], flush=True)
            print(f"{number} {name} compiled in {time.perf_counter() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--names", help="which implementations, with commas: widthwise, fla, flashqla")
    parser.add_argument("--only", help="numbers of rows, from 1, with commas, in this order")
    parser.add_argument("--compile", metavar="INDEX/PARTS")
    parser.add_argument("--first", action="store_true")
    parser.add_argument("--launches", action="store_true")
    parser.add_argument("--out", help="a JSON file for all figures")
    arguments = parser.parse_args()
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__, flush=True)
    if arguments.first:
        print(f"first forward+backward: {first_result(ROWS[0]):.1f} s", flush=True)
        return
    every = sorted(range(1, len(ROWS) + 1), key=lambda number: number == LAST)
    numbers = [int(number) for number in arguments.only.split(",")] if arguments.only else every
    if arguments.compile:
        fill_caches(arguments.compile, arguments.names.split(",") if arguments.names else list(PEERS), numbers)
        return
    names = arguments.names.split(",") if arguments.names else ["widthwise", *(PEERS if arguments.peers else ())]
    rules = {"widthwise": widthwise} if "widthwise" in names else {}
    rules |= peers(names) if set(names) & set(PEERS) else {}
    results = []
    for number in numbers:
        row = ROWS[number - 1]
        shape = (*row[:5], str(row[5]).removeprefix("torch."))
        ahead, both = floor(*row)
        print(f"{number} {shape} floor fwd {ahead:.3f} f+b {both:.3f}", flush=True)
        inputs = draw(*row)
        if arguments.launches:
            print("   ", launches(inputs), flush=True)
            continue
        for name, rule in rules.items():
            if name == "flashqla" and (row[3:5] != (128, 128) or row[5] == FP32):
                continue
            figures = measure(rule, row, inputs, name != "widthwise")
            results.append({"row": shape, "name": name, "floor": (ahead, both), **figures})
            text = {key: f"{x:.3f}" if isinstance(x, float) else x for key, x in figures.items()}
            print(f"    {name:10s}", *(f"{key} {x}" for key, x in text.items()), flush=True)
            if arguments.out:
                Path(arguments.out).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
