"""Training throughput of the generated 8-layer model, beside the same model with FLA's layer.

    python bench/throughput.py --output throughput.json      # 16 cores, one GPU: 12 minutes; 3 once compiled

A step is forward, backward and AdamW over float32 parameters, under bf16 autocast. Layers are compiled one by one by
torch.compile, which compiles all of them once; embedding, last norm, readout and loss are as they come. Each case is
timed twice: launched step by step, where a narrow model waits for Python; and with forward and backward replayed as one
CUDA graph, as ``widthwise sweep`` does.

    widthwise   the emitted model
    FLA layer   the emitted model whose mixers are fla.layers.GatedDeltaNet, of the same shape
    FLA scan    the emitted model whose scan is fla.ops' chunk_gated_delta_rule, one name in its module replaced

Every case is a process of its own. First all cores compile: the emitted models, and whatever FLA's kernels may choose
from, each process a share. Then each case has GPU and cores to itself: FLA chooses its configurations, and is timed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from widthwise.codegen.request import Request
from widthwise.verify.data import VOCABULARY
from widthwise.verify.transfer.config import Training
from widthwise.verify.transfer.step import Step, captured, eager
from widthwise.verify.transfer.train import generated

SIZES = {"width": 128, "depth": 8, "H": 6, "d_k": 16, "d_v": 32, "ffn": 352}  # d_k = d/8, d_v = d/4
OURS, LAYER, SCAN = VARIANTS = ("widthwise", "FLA layer", "FLA scan")


def ready_fla(keep_choices: bool = True) -> None:
    """FLA's own kernels: it hands calls to FlashQLA and TileLang where those are installed, and refuses its backward
    on some Triton versions and Hopper, a guard that is lifted here. Its choices are kept on disk for the next case."""
    os.environ.update(FLA_FLASH_QLA="0", FLA_TILELANG="0", FLA_CACHE_RESULTS=str(int(keep_choices)))
    import fla.ops.common.chunk_o as guarded
    import triton

    guarded.TRITON_ABOVE_3_7_1 = True
    whole = triton.testing.do_bench  # hundreds of configurations: a fifth of the usual time each
    triton.testing.do_bench = lambda call, quantiles: whole(call, warmup=5, rep=20, quantiles=quantiles)


class FLALayer(nn.Module):
    """fla.layers.GatedDeltaNet called as the emitted mixer is."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        from fla.layers import GatedDeltaNet

        self.mixer = GatedDeltaNet(hidden_size=width, num_heads=heads, head_dim=head_dim, expand_v=2)

    def forward(self, h: Tensor, cache: None = None) -> Tensor:
        return self.mixer(h)[0]


def build(width: int, variant: str, device: torch.device, depth: int = SIZES["depth"]) -> nn.Module:
    models = generated(Request("gated_deltanet", scaling="heads-fixed"), "model")
    sizes = models.GatedDeltaNetLM.widened(width, **SIZES) | {"depth": depth}
    model = models.GatedDeltaNetLM(**sizes, vocab=VOCABULARY, device=device)
    if variant == LAYER:
        for layer in model.model.layers:
            layer.attn = FLALayer(width, sizes["H"], sizes["d_k"]).to(device)
    if variant == SCAN:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        def scan(q: Any, k: Any, v: Any, g: Any, beta: Any, *, scale: float, normalize_qk: bool, **rest: Any) -> Any:
            return chunk_gated_delta_rule(
                *(x.bfloat16() for x in (q, k, v)), g, beta, scale=scale, use_qk_l2norm_in_kernel=normalize_qk
            )

        models.gated_delta_rule = scan
    return model


class Trainer:
    """Steps of one model over the same tokens."""

    def __init__(self, model: nn.Module, options: argparse.Namespace, device: torch.device) -> None:
        self.device, self.options, self.model = device, options, model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        tokens = torch.randint(VOCABULARY, (options.batch, options.length + 1), device=device)
        self.batch = tokens[:, :-1], tokens[:, 1:]
        self.gradients: Step = eager(model, model, Training(1, options.batch, options.length, bf16=True))

    def graph(self) -> None:
        self.gradients = captured(self.model, self.gradients, *self.batch)

    def steps(self, count: int) -> Tensor:
        for _ in range(count):
            loss = self.gradients(*self.batch)
            self.optimizer.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return loss

    def timed(self) -> dict[str, Any]:
        self.steps(5)
        spans = []
        for _ in range(self.options.repeats):
            start = time.perf_counter()
            loss = self.steps(self.options.steps)
            spans.append((time.perf_counter() - start) / self.options.steps)
        seconds = statistics.median(spans)
        return {
            "tokens_a_second": round(self.options.batch * self.options.length / seconds),
            "step_ms": round(1e3 * seconds, 2),
            "spread": round(max(spans) / min(spans) - 1, 3),
            "loss": round(float(loss), 3),
        }


def case(pipe: Connection, width: int, variant: str, options: argparse.Namespace) -> None:
    """Build; compile what nobody need be alone for; wait for the turn; time. Each message is a part of the result."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if variant != OURS:
            ready_fla()
        model = build(width, variant, device)
        if not options.eager:
            for layer in model.model.layers:
                layer.compile()
        trainer = Trainer(model, options, device)
        if variant == OURS:
            trainer.steps(3)
        pipe.send({"parameters": sum(p.numel() for p in model.parameters())})
        pipe.recv()
        begun = time.perf_counter()
        trainer.steps(3)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        pipe.send({"first_steps_s": round(time.perf_counter() - begun, 1)})
        pipe.send(trainer.timed())
        if device.type == "cuda":
            pipe.send({"memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)})
            trainer.graph()
            pipe.send({"as a graph": trainer.timed()})
    except Exception as error:  # a case that fails leaves its message in the table
        pipe.send({"failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"})
    pipe.close()


def fill(index: int, parts: int, options: argparse.Namespace) -> None:
    """Compile a share of what FLA's kernels may choose from at these widths, without timing anything."""
    ready_fla(keep_choices=False)
    from triton.runtime.autotuner import Autotuner

    def compile_only(self: Any, *args: Any, config: Any, **meta: Any) -> list[float]:
        place = self.configs.index(config) if config in self.configs else 0
        if place % parts != index:  # if it must be one of these that goes on, then one of little shared memory
            return [1e6 * config.num_stages + place] * 3
        try:
            kernel = self.fn.run(*args, **{**meta, **config.all_kwargs(), "warmup": True, "grid": meta["grid"]})
            kernel._init_handles()  # says what is too large for this chip
        except Exception:
            return [1e9] * 3
        return [float(place)] * 3

    Autotuner._bench = compile_only
    device = torch.device("cuda")
    for width in options.widths:
        for variant in options.variants:
            if variant != OURS:
                try:
                    trainer = Trainer(build(width, variant, device, depth=1), options, device)
                    trainer.gradients(*trainer.batch)
                    del trainer
                except Exception as error:
                    print("compiling", width, variant, type(error).__name__, str(error)[:100], flush=True)
                torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 1024, 2048])
    parser.add_argument("--variants", nargs="+", default=[OURS, LAYER], choices=VARIANTS)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=10, help="timed together; the median of --repeats such spans")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--patience", type=float, default=400, help="seconds for everything")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--output", type=Path, help="JSON, written after every case")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    until = time.monotonic() + options.patience
    cases = [(width, variant) for variant in options.variants for width in options.widths]
    running = {}
    for one in cases:
        ours, theirs = context.Pipe()
        running[one] = context.Process(target=case, args=(theirs, *one, options), daemon=True), ours
        running[one][0].start()
        theirs.close()
    compile_all(context, options, until)
    results: dict[tuple[int, str], dict[str, Any]] = {}
    for one in cases:
        process, pipe = running[one]
        results[one] = heard(pipe, until)
        process.kill()
        process.join()  # its memory is the next one's
        print(f"{until - time.monotonic():.0f} s left;", *one, results[one], flush=True)
        if options.output:
            write(options, results)


def compile_all(context: Any, options: argparse.Namespace, until: float) -> None:
    """Fill the cache of FLA's kernels, for up to half of the time that is left."""
    if not torch.cuda.is_available() or set(options.variants) == {OURS}:
        return
    begun = time.monotonic()
    parts = max(1, (os.cpu_count() or 1) // 2)  # the emitted models compile meanwhile; each takes up to 5 GiB
    fillers = [context.Process(target=fill, args=(part, parts, options), daemon=True) for part in range(parts)]
    for each in fillers:
        each.start()
    for each in fillers:
        each.join(max(0.0, (begun + until) / 2 - time.monotonic()))
        each.kill()
    print(f"FLA's kernels compiled in {time.monotonic() - begun:.0f} s", flush=True)


def heard(pipe: Connection, until: float) -> dict[str, Any]:
    """All that a case says once it is its turn, or why it says no more."""
    result: dict[str, Any] = {}
    try:
        while pipe.poll(max(0.0, until - time.monotonic())):
            result |= pipe.recv()
            if result.keys() == {"parameters"}:
                pipe.send("go")
        return result | {"failed": "the time was up"}
    except (EOFError, OSError):
        return result if "step_ms" in result or "failed" in result else result | {"failed": "its process ended"}


def write(options: argparse.Namespace, results: dict[tuple[int, str], dict[str, Any]]) -> None:
    cuda = torch.cuda.is_available()
    head = {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": torch.__version__,
        **{key: getattr(options, key) for key in ("batch", "length", "eager")},
        "sizes": SIZES,
    }
    rows = [{"width": width, "variant": variant, **values} for (width, variant), values in results.items()]
    options.output.write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
