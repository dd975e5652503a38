"""How many channels carry a product of trained factors while SGD trains, width by width.

    python bench/transfer/channels.py heads-fixed --widths 128 512 1024 2048 --lr 0.5 --output FILE.json

For the products that W_o and W_down read (o_norm(o) · silu(z_g) and silu(z_gate) · z_up) and for z_g: the rms, the
median size, and the number of channels that carry it, (Σ m)² / Σ m² of the mean squares m of each channel: all of
them where they are alike, 1 where one channel has it all. Of what o_norm divides by, per token and head: the mean of
1 / mean square over its median's, which a few tokens with a small o raise. Runs are those of the sweep of that name.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from widthwise.verify.transfer.config import Run, Variant, read_sweep
from widthwise.verify.transfer.step import eager, loss_of
from widthwise.verify.transfer.train import batches, build, optimizer_of, schedule

STEPS = (0, 10, 20, 40, 60, 100, 200, 300, 399)


def run_of(scaling: str, width: int, lr: float, regime: str | None) -> Run:
    sweep = read_sweep(Path(__file__).parent / f"{scaling}-sgd.toml")
    sweep = replace(sweep, parametrizations=("here",), variants={"here": Variant(regime=regime)})
    return sweep.run("here", width, lr, 0)


def carried(x: Tensor) -> dict[str, float]:
    """Of x [B, T, channels]."""
    squares = x.float().square().flatten(0, 1)
    each = squares.mean(0)
    return {
        "rms": float(squares.mean().sqrt()),
        "median": float(squares.median().sqrt()),
        "channels": float(each.sum().square() / each.square().sum()),
        "of": x.shape[-1],
    }


def spread(o: Tensor, eps: float) -> dict[str, float]:
    """Of o [B, T, H, d_v]."""
    squares = o.float().square().mean(-1)
    return {"spread": float((squares + eps).reciprocal().mean() * squares.median())}


def watched(model: nn.Module) -> dict[str, dict[str, float]]:
    """What hooks fill with every forward pass."""
    seen: dict[str, dict[str, float]] = {}

    def reading(name: str) -> Any:
        return lambda module, inputs: seen.__setitem__(name, carried(inputs[0].detach()))

    def made(name: str) -> Any:
        return lambda module, inputs, output: seen.__setitem__(name, carried(output.detach()))

    def dividing(name: str) -> Any:
        return lambda module, inputs: seen.__setitem__(name, spread(inputs[0].detach(), module.eps))

    for index, layer in enumerate(model.model.layers):
        layer.attn.o_norm.register_forward_pre_hook(dividing(f"{index} o"))
        layer.attn.o_proj.register_forward_pre_hook(reading(f"{index} mixer"))
        layer.attn.g_proj.register_forward_hook(made(f"{index} z_g"))
        layer.mlp.down_proj.register_forward_pre_hook(reading(f"{index} mlp"))
    return seen


def trained(run: Run, device: torch.device) -> Iterator[tuple[int, nn.Module, Tensor, Tensor]]:
    """Train as sweeps do: before each step its number, the model and the tokens and targets of the step."""
    training = run.training
    model, groups, _ = build(run, device)
    optimizer = optimizer_of("sgd", groups, training, device)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda at: schedule(training, at))
    step, data = eager(model, model, training), batches(run.data, training, run.seed)
    for at in range(training.steps):
        tokens, targets = (each.to(device) for each in next(data))
        yield at, model, tokens, targets
        step(tokens, targets)
        nn.utils.clip_grad_norm_(model.parameters(), training.clip)
        optimizer.step()
        scheduler.step()


def measured(run: Run, device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {}
    seen: dict[str, dict[str, float]] = {}
    for at, model, tokens, targets in trained(run, device):
        seen = seen or watched(model)
        if at in STEPS:
            with torch.no_grad():
                loss = float(loss_of(model, tokens, targets, run.training))
            found[str(at)] = {"loss": loss, **seen}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scaling", choices=("heads-fixed", "head-dim-fixed"))
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--lr", type=float, default=0.5)
    parser.add_argument("--regime", choices=("practical", "asymptotic"))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {}
    for width in options.widths:
        found[width] = measured(run_of(options.scaling, width, options.lr, options.regime), device)
        for at, here in found[width].items():
            first = here["0 mixer"]
            print(
                f"width {width}, step {at}: rms {first['rms']:.2f}, {first['channels']:.1f} channels of {first['of']}"
            )
        if options.output:
            options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
