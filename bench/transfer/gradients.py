"""Which roles' gradients keep their derived size while SGD trains: the slope of lr_r |g_r|² in width, role by role.

    python bench/transfer/gradients.py heads-fixed --widths 64 128 256 512 [--fix o_norm.lr=0] [--output FILE.json]

lr_r is the role's learning rate relative to the base's; the square is summed over all of the role's entries and layers.
It is how fast one step of the role alone lowers the loss, and so should not depend on the width where the rules hold.
Two layers, on the CPU in a few minutes; medians over the steps of each stage.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from widthwise.verify.transfer.config import Run, Variant, read_sweep
from widthwise.verify.transfer.step import eager
from widthwise.verify.transfer.train import batches, build, optimizer_of, schedule

HEADS = {"heads-fixed": {"H": 6, "d_k": 8, "d_v": 16}, "head-dim-fixed": {"H": 3, "d_k": 16, "d_v": 32}}
STAGES = {"first step": range(1), "steps 1-19": range(1, 20), "20-59": range(20, 60), "60-99": range(60, 100)}
STEPS, PLANNED = 100, 200  # trained, of a schedule of so many


def run_of(scaling: str, width: int, lr: float, fix: tuple[str, ...]) -> Run:
    sweep = read_sweep(Path(__file__).parent / f"{scaling}-sgd.toml")
    names = ("widthwise", "fixed")
    sweep = replace(sweep, base_width=64, parametrizations=names, variants={"fixed": Variant(fix=fix)})
    sizes = {"width": 64, "depth": 2, "ffn": 176, **HEADS[scaling]}
    training = replace(sweep.training, steps=PLANNED, warmup=20, batch=8, length=128, bf16=False)
    return replace(sweep.run("fixed" if fix else "widthwise", width, lr, 0), sizes=sizes, training=training)


def energies(
    run: Run,
    alter: Callable[[Any, Run], None] = lambda model, run: None,
    also: Callable[[str, Tensor], dict[str, float]] = lambda role, gradient: {},
) -> dict[str, dict[str, float]]:
    """By stage and role, of a model that ``alter`` may change first, and whatever ``also`` makes of gradients."""
    torch.set_flush_denormal(True)
    device, training = torch.device("cpu"), run.training
    model, groups, _ = build(run, device)
    alter(model, run)
    optimizer = optimizer_of("sgd", groups, training, device)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda at: schedule(training, at))
    relative = {id(p): group["initial_lr"] / run.lr for group in optimizer.param_groups for p in group["params"]}
    step, data = eager(model, model, training), batches(run.data, training, run.seed)
    seen: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for at in range(STEPS):
        step(*next(data))
        energy: dict[str, float] = defaultdict(float)
        for name, parameter in model.named_parameters():
            role = re.sub(r"^model\.(layers\.\d+\.)?|\.weight$", "", name)
            energy[role] += relative[id(parameter)] * float(parameter.grad.square().sum())
            energy |= {f"{what} of {name}": value for what, value in also(role, parameter.grad).items()}
        (stage,) = (stage for stage, steps in STAGES.items() if at in steps)
        for role, value in energy.items():
            seen[stage][role].append(value)
        nn.utils.clip_grad_norm_(model.parameters(), training.clip)
        optimizer.step()
        scheduler.step()
    return {stage: {role: median(values) for role, values in roles.items()} for stage, roles in seen.items()}


def slope(widths: list[int], values: list[float]) -> float:
    x, y = [math.log(width) for width in widths], [math.log(value) for value in values]
    middle = sum(x) / len(x)
    return sum((a - middle) * b for a, b in zip(x, y, strict=True)) / sum((a - middle) ** 2 for a in x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scaling", choices=HEADS)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--lr", type=float, default=0.35)
    parser.add_argument("--fix", action="append", default=[], metavar="ROLE.lr=EXPONENT")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    found = {}
    for width in options.widths:
        found[width] = energies(run_of(options.scaling, width, options.lr, tuple(options.fix)))
        if options.output:
            options.output.write_text(json.dumps(found, indent=1) + "\n")
    print("| role | " + " | ".join(STAGES) + " |\n| --- |" + " ---: |" * len(STAGES))
    for role in found[options.widths[0]]["first step"]:
        rows = [slope(options.widths, [found[width][stage][role] for width in options.widths]) for stage in STAGES]
        print(f"| `{role}` | " + " | ".join(f"{each:+.2f}" for each in rows) + " |")


if __name__ == "__main__":
    main()
