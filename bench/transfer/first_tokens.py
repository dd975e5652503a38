"""What the output norms read while SGD trains, at the first tokens of sequences and elsewhere.

    python bench/transfer/first_tokens.py head-dim-fixed --width 128 --lr 0.7 --steps 60  # half a minute on two cores

By step and layer: the median mean square of o over d_v, over all tokens and heads; the median of those at a sequence's
first token, and the smallest of these; the same at the second and the ninth. Runs are those of the sweep of that name.
"""

from __future__ import annotations

import argparse

import torch
from channels import run_of, trained
from torch import Tensor, nn

PLACES = (0, 1, 8)


def read_by_norms(model: nn.Module, tokens: Tensor) -> list[Tensor]:
    """Of each layer, the mean squares [B, T, H] that its output norm divides by."""
    found: list[Tensor] = []
    norms = [module for name, module in model.named_modules() if name.endswith("o_norm")]
    hooks = [
        norm.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].float().square().mean(-1)))
        for norm in norms
    ]
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scaling", choices=("heads-fixed", "head-dim-fixed"))
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.7)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    run = run_of(options.scaling, options.width, options.lr, None)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print("| step | layer | all | " + " | ".join(f"token {place + 1}, least" for place in PLACES) + " |")
    print("| ---: | ---: | ---: |" + " ---: |" * len(PLACES))
    for at, model, tokens, _ in trained(run, device):
        if at in (0, options.steps // 2, options.steps):
            for layer, read in enumerate(read_by_norms(model, tokens)):
                places = (f"{read[:, place].median():.1e}, {read[:, place].min():.1e}" for place in PLACES)
                print(f"| {at} | {layer} | {read.median():.1e} | " + " | ".join(places) + " |")
        if at == options.steps:
            return


if __name__ == "__main__":
    main()
