"""What makes the mixer's gradients larger in wider models under SGD? gradients.py over seeds, by head, with changes.

    python bench/transfer/gradients_heads.py [--seeds 3] [--only asymptotic eps] --output FILE.json     # 40 minutes

lr_r |g_r|² as in gradients.py (two layers, on the CPU), and of each layer's W_q, W_k and W_v the |g|² of the median and
of the largest head's rows, times the number of heads: the whole matrix's, if heads were alike. Rules are those past the
crossovers, but for what CHANGES say.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from gradients import HEADS, PLANNED, energies, slope
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from widthwise.verify.transfer.config import Run, Variant, read_sweep
from widthwise.verify.transfer.train import batches

WIDTHS = (64, 128, 256)
QK = ("q_proj.lr=-1/2", "k_proj.lr=-1/2", "q_conv1d.lr=1/2", "k_conv1d.lr=1/2")
GATES = ("b_proj.lr=-1/2", "a_proj.lr=-1/2", "A_log.lr=1/2", "dt_bias.lr=1/2")
GO = ("g_proj.lr=-1/2", "o_proj.lr=-1/2")
REST = ("v_proj.lr=-1/2", "v_conv1d.lr=1/2", "o_norm.lr=-1/2", "attn_norm.lr=1/2")
SHOWN = {
    "q, k": ("q_proj", "k_proj"),
    "v": ("v_proj",),
    "g": ("g_proj",),
    "o": ("o_proj",),
    "convolutions": ("conv1d",),
    "gates": ("a_proj", "b_proj"),
    "embeddings": ("embeddings",),
    "MLP": ("gate_proj", "up_proj", "down_proj"),
    "all": ("",),
}


@dataclass(frozen=True)
class Change:
    """How a row differs from the rules past the crossovers at learning rate 0.35, head dims fixed, 3 heads at 64."""

    scaling: str = "head-dim-fixed"
    lr: float = 0.35
    heads: tuple[int, int, int] | None = None  # H, d_k, d_v at the base width
    eps: float = 0.0  # of the output norm, over the median mean square of what it reads before training
    fix: tuple[str, ...] = ()
    assume: str | None = None


CHANGES = {
    "asymptotic": Change(),
    "heads fixed": Change("heads-fixed", heads=(3, 16, 32)),
    "eps": Change(eps=0.3),
    "12 heads": Change(heads=(12, 4, 8)),
    "lr 0.1": Change(lr=0.1),
    "law": Change(assume="largest-channel"),
    "q, k, gates slowed": Change(fix=QK + GATES),
    "g, o slowed": Change(fix=GO),
    "mixer slowed": Change(fix=QK + GATES + GO + REST),
    "embedding, readout slowed": Change(fix=("embeddings.lr=1/2", "lm_head.lr=1/2")),
    "gains slowed": Change(fix=("attn_norm.lr=1/2", "mlp_norm.lr=1/2", "norm.lr=1/2")),
    "MLP slowed": Change(fix=("gate_proj.lr=-1/2", "up_proj.lr=-1/2", "down_proj.lr=-1/2")),
}


def run_of(change: Change, width: int, seed: int) -> Run:
    sweep = read_sweep(Path(__file__).parent / f"{change.scaling}-sgd.toml")
    here = Variant(regime="asymptotic", fix=change.fix, assume=change.assume)
    sweep = replace(sweep, base_width=64, parametrizations=("widthwise", "here"), variants={"here": here})
    heads = dict(zip(("H", "d_k", "d_v"), change.heads, strict=True)) if change.heads else HEADS["head-dim-fixed"]
    training = replace(sweep.training, steps=PLANNED, warmup=20, batch=8, length=128, bf16=False)
    sizes = {"width": 64, "depth": 2, "ffn": 176, **heads}
    return replace(sweep.run("here", width, change.lr, seed), sizes=sizes, training=training)


def raise_eps(model: Any, run: Run, share: float) -> None:
    """Give each output norm an eps of this share of what it typically reads."""
    read: list[float] = []

    def look(module: nn.Module, inputs: tuple[Tensor]) -> None:
        read.append(float(inputs[0].detach().square().mean(-1).median()))

    norms = [layer.attn.o_norm for layer in model.model.layers]
    hooks = [norm.register_forward_pre_hook(look) for norm in norms]
    with torch.no_grad():
        model(next(batches(run.data, run.training, 99))[0])
    for hook, norm, typical in zip(hooks, norms, read, strict=True):
        hook.remove()
        norm.eps = share * typical


def measured(change: Change, width: int, seed: int) -> dict[str, dict[str, float]]:
    """By stage, of each role the median over steps."""
    run = run_of(change, width, seed)
    heads = run.sizes["H"] * (width // 64 if change.scaling == "head-dim-fixed" else 1)

    def alter(model: Any, run: Run) -> None:
        if change.eps:
            raise_eps(model, run, change.eps)

    def by_head(role: str, gradient: Tensor) -> dict[str, float]:
        if role not in ("attn.q_proj", "attn.k_proj", "attn.v_proj"):
            return {}
        each = heads * gradient.reshape(heads, -1).square().sum(1)
        return {"median head": float(each.median()), "largest head": float(each.max())}

    return {stage: summary(roles) for stage, roles in energies(run, alter, by_head).items()}


def summary(roles: dict[str, float]) -> dict[str, float]:
    """The rows of SHOWN, and of W_q and W_k together, and of W_v, the median and largest head, layers added.
    The last norm, 1 or 2 % of all, is left out."""
    plain = {role: value for role, value in roles.items() if " of " not in role and role != "norm"}
    shown = {name: sum(plain[role] for role in plain if role.endswith(ends)) for name, ends in SHOWN.items()}
    for which in ("median head", "largest head"):
        of = {role: value for role, value in roles.items() if role.startswith(which)}
        for name in ("q, k", "v"):
            shown[f"{which}, {name}"] = sum(
                of[role] for role in of if role.removesuffix(".weight").endswith(SHOWN[name])
            )
    return {name: float(f"{value:.4g}") for name, value in shown.items()}


def told(found: dict[int, dict[int, dict[str, dict[str, float]]]], stage: str, name: str) -> str:
    slopes = [slope(list(WIDTHS), [widths[width][stage][name] for width in WIDTHS]) for widths in found.values()]
    error = f" ± {stdev(slopes) / len(slopes) ** 0.5:.2f}" if len(slopes) > 1 else ""
    return f"{fmean(slopes):+.2f}{error}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=CHANGES, default=list(CHANGES))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict[int, Any]] = {}
    print(f"| steps 20-59 | {' | '.join(SHOWN)} |\n| --- |" + " ---: |" * len(SHOWN))
    for name in options.only:
        found[name] = {}
        for seed in range(options.seeds):
            found[name][seed] = {width: measured(CHANGES[name], width, seed) for width in WIDTHS}
        print(f"| {name} | {' | '.join(told(found[name], '20-59', each) for each in SHOWN)} |", flush=True)
        if options.output:
            options.output.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
