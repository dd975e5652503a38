"""Training throughput of the generated 8-layer model, beside the same model with FLA's scan and with FLA's layer.

    python bench/throughput.py --output throughput.json      # about 2 minutes on one GPU, compilation included

Every case is a process of its own. All of them compile side by side; then each one is timed with the GPU to itself.
A step is forward, backward and AdamW over float32 parameters, under bf16 autocast. Layers are compiled one by one by
torch.compile, which compiles all of them once; embedding, last norm, readout and loss are as they come.

    widthwise   the emitted model
    FLA scan    the emitted model whose scan is fla.ops' chunk_gated_delta_rule, one name in its module replaced
    FLA layer   the emitted model whose mixers are fla.layers.GatedDeltaNet, of the same shape
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from widthwise.codegen.request import Request
from widthwise.verify.data import VOCABULARY
from widthwise.verify.transfer.train import generated

SIZES = {"width": 128, "depth": 8, "H": 6, "d_k": 16, "d_v": 32, "ffn": 352}  # d_k = d/8, d_v = d/4
VARIANTS = ("widthwise", "FLA scan", "FLA layer")


def ready_fla() -> None:
    """FLA's own kernels: it hands calls to FlashQLA and TileLang where those are installed, and refuses its backward
    on some Triton versions and Hopper, a guard that is lifted here."""
    os.environ.update(FLA_FLASH_QLA="0", FLA_TILELANG="0")
    import fla.ops.common.chunk_o as guarded

    guarded.TRITON_ABOVE_3_7_1 = True


class FLALayer(nn.Module):
    """fla.layers.GatedDeltaNet called as the emitted mixer is."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        from fla.layers import GatedDeltaNet

        self.mixer = GatedDeltaNet(hidden_size=width, num_heads=heads, head_dim=head_dim, expand_v=2)

    def forward(self, h: torch.Tensor, cache: None = None) -> torch.Tensor:
        return self.mixer(h)[0]


def build(width: int, variant: str, device: torch.device) -> nn.Module:
    models = generated(Request("gated_deltanet", scaling="heads-fixed"), "model")
    sizes = models.GatedDeltaNetLM.widened(width, **SIZES)
    model = models.GatedDeltaNetLM(**sizes, vocab=VOCABULARY, device=device)
    if variant == "widthwise":
        return model
    ready_fla()
    if variant == "FLA layer":
        for layer in model.model.layers:
            layer.attn = FLALayer(width, sizes["H"], sizes["d_k"]).to(device)
        return model
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    def scan(q: Any, k: Any, v: Any, g: Any, beta: Any, *, scale: float, normalize_qk: bool, **rest: Any) -> Any:
        return chunk_gated_delta_rule(
            *(x.bfloat16() for x in (q, k, v)), g, beta, scale=scale, use_qk_l2norm_in_kernel=normalize_qk
        )

    models.gated_delta_rule = scan
    return model


def training_step(model: nn.Module, batch: int, length: int, device: torch.device) -> Callable[[], torch.Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(VOCABULARY, (batch, length + 1), device=device)

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(tokens[:, :-1])
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def case(pipe: Connection, width: int, variant: str, options: argparse.Namespace) -> None:
    """Compile, say so, wait for the turn, time. Where memory is short while others compile, try again."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    begun = time.perf_counter()
    try:
        model = build(width, variant, device)
        if not options.eager:
            for layer in model.model.layers:
                layer.compile()
        step = training_step(model, options.batch, options.length, device)
        done = 0
        while done < 3:
            try:
                step()
                synchronize(device)
                done += 1
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                time.sleep(2)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        pipe.send({"compiled_s": round(time.perf_counter() - begun, 1)})
        pipe.recv()
        for _ in range(5):
            loss = step()
        synchronize(device)
        spans = []
        for _ in range(options.repeats):
            start = time.perf_counter()
            for _ in range(options.steps):
                loss = step()
            synchronize(device)
            spans.append((time.perf_counter() - start) / options.steps)
        seconds = statistics.median(spans)
        pipe.send(
            {
                "tokens_a_second": round(options.batch * options.length / seconds),
                "step_ms": round(1e3 * seconds, 2),
                "spread": round(max(spans) / min(spans) - 1, 3),
                "loss": round(float(loss), 3),
                "parameters": sum(p.numel() for p in model.parameters()),
                "memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if device.type == "cuda" else None,
            }
        )
    except Exception as error:  # a peer that fails leaves its message in the table
        pipe.send({"failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 1024, 2048])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=10, help="timed together; the median of --repeats such spans")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--patience", type=float, default=110, help="seconds that all may take to compile")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--output", type=Path, help="JSON")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    cases = [(width, variant) for width in options.widths for variant in options.variants]
    results: dict[tuple[int, str], dict[str, Any]] = {}
    waiting: dict[Connection, tuple[int, str]] = {}
    processes = {}
    for one in cases:
        ours, theirs = context.Pipe()
        processes[one] = context.Process(target=case, args=(theirs, *one, options), daemon=True)
        processes[one].start()
        theirs.close()
        waiting[ours] = one
    compiled: dict[tuple[int, str], Connection] = {}
    until = time.monotonic() + options.patience
    while waiting and (ready := wait(list(waiting), max(0.0, until - time.monotonic()))):
        for pipe in ready:
            one = waiting.pop(pipe)
            results[one] = heard(pipe)
            if "failed" not in results[one]:
                compiled[one] = pipe
    for one in waiting.values():
        results[one] = {"failed": f"not compiled in {options.patience:g} s"}
        processes[one].kill()
    for one in cases:
        if one in compiled:
            compiled[one].send("go")
            results[one] |= heard(compiled[one])
            processes[one].kill()
            processes[one].join()  # its memory is the next one's
        print(*one, results[one], flush=True)
        if options.output:
            write(options, results)


def heard(pipe: Connection) -> dict[str, Any]:
    try:
        return pipe.recv()
    except EOFError:
        return {"failed": "its process ended"}


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
