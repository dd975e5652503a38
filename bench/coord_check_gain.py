"""What the finding ``early-branch`` says, measured: the gradient of a gain that growing heads share, by where it comes from.

python bench/coord_check_gain.py > docs/results/coord_check_gain.md        # a minute on an idle CPU core

∂L/∂o_norm = Σ u · W_oᵀ∂L/∂y, with u what the gain scales. With W_o = W₀ + ΔW it has a part through the initial weight,
incoherent over heads (n^-1/2), and one through the weight's own steps, coherent (n^0), however few those were.
"""  # noqa: E501

import argparse
import platform
from math import sqrt

import torch
from coord_check_gates import batches, subject

from widthwise.verify.coord.alignment import gradients
from widthwise.verify.coord.run import Measurements
from widthwise.verify.coord.stats import fit

STEPS = (1, 5, 20, 60)
PARTS = ("through W₀", "through ΔW", "together")
LR = 0.3


def watch(found: Measurements, smallest: int, width: int, seed: int) -> None:
    """Note both parts of the gradient of ``o_norm`` under SGD, head dims fixed, after each of the steps."""
    model = subject("sgd", smallest, lr=LR, scaling="head-dim-fixed").make(width, seed)
    data = batches(seed)
    probe = batch = next(data)
    gain, weight = model.parameters["o_norm"], model.parameters["o_proj"]
    start = weight.detach().clone()
    for step in range(max(STEPS) + 1):
        if step in STEPS:
            tensors = gradients(model, probe)
            assert gain.grad is not None
            read = tensors["o_normed"].detach()  # times SiLU of the gate is what o_proj reads
            read = read * torch.nn.functional.silu(tensors["z_g"].detach().view_as(read))
            assert tensors["y"].grad is not None
            back = torch.tensordot(tensors["y"].grad, (weight - start).detach(), dims=([-1], [0])).view_as(read)
            moved = (read / gain.detach() * back).flatten(0, -2).sum(0)
            for part, value in zip(PARTS, (gain.grad - moved, moved, gain.grad), strict=True):
                found.note("weight gradient", part, step, seed, rms=sqrt(float(value.square().mean())))
            agree = float(moved.sum().abs() / moved.norm()) / sqrt(moved.numel())  # 1 where all entries are equal
            assert tensors["o_normed"].grad is not None
            heads = (tensors["o_normed"].detach() * tensors["o_normed"].grad).sum((0, 1)).square().sum(-1)
            found.note("weight gradient", "agreement", step, seed, value=agree)
            found.note("weight gradient", "largest head", step, seed, value=float(heads.max() / heads.sum()))
        gradients(model, batch)
        model.optimizer.step()
        batch = next(data)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--seeds", type=int, default=8)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    widths = tuple(asked.widths)
    found = Measurements(widths)
    for seed in range(asked.seeds):
        for width in widths:
            watch(found, widths[0], width, seed)
    print("# A gain shared by growing heads, under SGD\n")
    print(
        f"`python bench/coord_check_gain.py`: Gated DeltaNet, head dims fixed, learning rate {LR}, widths "
        f"{list(widths)}, {asked.seeds} seeds. Rms of ∂L/∂o_norm through the initial W_o, "
        "through what its steps have added, and together: slope against width ± standard error over seeds, and size at "
        "each width. Agreement: 1 where all entries of the gain get one and the same number, 0.2 where signs are "
        f"random. torch {torch.__version__}, Python {platform.python_version()}.\n"
    )
    print(
        "| step | part | derived | slope | at the two largest widths | size by width |\n|---:|---|---:|---:|---:|---|"
    )
    for step in STEPS:
        for part, derived in zip(PARTS, ("-1/2", "0", ""), strict=True):
            slope = fit(widths, found.rows("weight gradient", part, step, "rms"))
            sizes = ", ".join(f"{size:.2g}" for size in found.average("weight gradient", part, step, "rms"))
            print(
                f"| {step} | {part} | {derived} | {slope.value:+.2f} ± {slope.error:.2f} "
                f"| {slope.local:+.2f} ± {slope.local_error:.2f} | {sizes} |"
            )
        for title, name, derived in (
            ("agreement of the part through ΔW", "agreement", "1"),
            ("largest head's share of all", "largest head", "1 / heads"),
        ):
            values = found.means("weight gradient", name, step, "value")
            print(f"| {step} | {title} | {derived} | | | {', '.join(f'{each:.2f}' for each in values)} |")


if __name__ == "__main__":
    main()
