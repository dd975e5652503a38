"""Which channels get away while SGD warms up: the convolutions of a layer, step by step.

    python bench/transfer/taps.py bench/transfer/heads-fixed-sgd-eps.toml largest-channel --widths 128 2048 --lr 1

For what each convolution puts out (q, k, v before SiLU), what W_o reads, and z of both gates: the rms and the number of
channels that carry it, as in channels.py; and the largest tap, which begins at 0.5. Runs are those of the sweep.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from channels import carried, trained
from torch import Tensor, nn

from widthwise.verify.transfer.config import Run, read_sweep
from widthwise.verify.transfer.step import loss_of

STEPS = (1, 10, 16, 20, 24, 28, 32, 36, 44, 60, 98)
READ = ("q_conv1d", "k_conv1d", "v_conv1d", "b_proj", "a_proj")  # by what they put out; o_proj by what it reads


def watched(model: nn.Module, layer: int) -> dict[str, Any]:
    """What hooks fill with every forward pass."""
    seen: dict[str, Any] = {}
    mixer = model.model.layers[layer].attn

    def made(name: str) -> Any:
        return lambda module, inputs, output: seen.__setitem__(name, _short(output))

    for name in READ:
        getattr(mixer, name).register_forward_hook(made(name))
    mixer.o_proj.register_forward_pre_hook(lambda module, inputs: seen.__setitem__("o_proj", _short(inputs[0])))
    return seen


def _short(x: Tensor) -> dict[str, float]:
    found = carried(x.detach())
    return {"rms": round(found["rms"], 3), "channels": round(found["channels"], 1)}


def measured(run: Run, device: torch.device, layer: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    seen: dict[str, Any] = {}
    for at, model, tokens, targets in trained(run, device):
        if at > STEPS[-1]:
            break
        seen = seen or watched(model, layer)
        if at in STEPS:
            with torch.no_grad():
                loss = float(loss_of(model, tokens, targets, run.training))
            mixer = model.model.layers[layer].attn
            taps = {name: round(float(getattr(mixer, name).weight.detach().abs().max()), 2) for name in READ[:3]}
            found[str(at)] = {"loss": round(loss, 3), "largest tap": taps, **seen}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("parametrization")
    parser.add_argument("--widths", type=int, nargs="+", default=[128])
    parser.add_argument("--lr", type=float, default=0.707107)
    parser.add_argument("--layer", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON, to which is added what it does not hold")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sweep = read_sweep(options.sweep)
    found = json.loads(options.output.read_text()) if options.output and options.output.exists() else {}
    for width in options.widths:
        run = sweep.run(options.parametrization, width, options.lr, 0)
        steps = measured(run, device, options.layer)
        found[f"{options.sweep.stem} {options.parametrization} {width} {options.lr:g}"] = steps
        for at, here in steps.items():
            told = ", ".join(f"{name} {here[name]['rms']:.2f} by {here[name]['channels']:.0f}" for name in READ[:3])
            print(f"width {width}, step {at}: loss {here['loss']:.2f}; {told}", flush=True)
        if options.output:
            options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
