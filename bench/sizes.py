"""Predicted and measured slopes of every named tensor of Gated DeltaNet at initialization.

python bench/sizes.py > docs/results/sizes.md      # about three minutes on two CPU cores
"""

import platform

import torch

from widthwise.derive import architecture, derive
from widthwise.derive.exponents import show
from widthwise.verify.execute import Setting
from widthwise.verify.sizes import measure

WIDTHS = [64, 128, 256, 512]
SIZES = {"d_model": 64, "vocab": 16, "taps": 4, "ffn": 128, "G": 2}
HEADS = {"heads-fixed": {"H": 4, "d_k": 8, "d_v": 16}, "head-dim-fixed": {"H": 4, "d_k": 16, "d_v": 16}}
# At the base width, gates near their bias as in practice. (A gate input of Θ(1) that vanishes with the width goes
# through an exponential, which is no power law before it is small.)
BASE = {"a_proj": 0.1}
SEEDS = 24


def settings(scaling: str) -> list[Setting]:
    """The widths, four of them."""
    return [Setting(width, WIDTHS[0], SIZES | HEADS[scaling], multipliers=BASE) for width in WIDTHS]


def main() -> None:
    print("# Sizes at initialization: derived and measured\n")
    print(
        f"`python bench/sizes.py`: widths {WIDTHS}, {SEEDS} seeds, batch 2 × 16 random tokens, one layer, norm eps 0, "
        f"float32; rms of forward entries, geometric mean of gradients; slope of log size against log width ± standard "
        f"error. "
        f"torch {torch.__version__}, Python {platform.python_version()}.\n"
    )
    print("Bold: more than 0.15 and two standard errors from the derived exponent.\n")
    for scaling in HEADS:
        for activation in (True, False):
            graph = architecture("gated_deltanet", scaling=scaling, activation=activation)
            table = derive(graph, "sgd")
            found = measure(graph, table, settings(scaling), seeds=SEEDS)
            print(f"## {scaling}, SiLU on q, k, v {'on' if activation else 'off'}\n")
            print("| tensor | forward: derived | measured | gradient: derived | measured |\n|---|---:|---:|---:|---:|")
            gradients = {each.name: each for each in found.gradient}
            for each in found.forward:
                other, sizes = gradients[each.name], table.tensor(each.name)
                cells = [f"{one.measured:+.2f} ± {one.error:.2f}" for one in (each, other)]
                cells = [
                    f"**{cell}**" if one.off > max(0.15, 2 * one.error) else cell
                    for cell, one in zip(cells, (each, other), strict=True)
                ]
                print(f"| `{each.name}` | {show(sizes.forward)} | {cells[0]} | {show(sizes.gradient)} | {cells[1]} |")
            print()
    print(
        "What is bold: softmax of logits that are Θ(1) at the base width and shrink from there flattens as the width "
        "grows, which the typical gradient of a logit feels until they are small. (By rms instead of typical size, the "
        "gradient of `o` would be bold too: the norm behind it divides by the tiny norms of a few tokens.)"
    )


if __name__ == "__main__":
    main()
