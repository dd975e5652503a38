"""Why some lines of the coordinate check drift with heads fixed: each explanation with what it rests on.

python bench/coord_check_why.py > docs/results/coord_check_why.md                   # two minutes on an idle CPU core
python bench/coord_check_why.py --long --widths 512 1024 2048 4096 --seeds 6 --jobs 5     # on a GPU, a minute
"""

import argparse
import platform
import sys
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import get_context

import torch
from coord_check import FIRST, Case

from widthwise.verify.coord.described import Described
from widthwise.verify.coord.predict import follows_gradient, predictions
from widthwise.verify.coord.run import Measurements, measure
from widthwise.verify.coord.stats import Result, fit, results
from widthwise.verify.coord.subject import Model

QUERIES_AND_KEYS = ("q_proj", "q_conv1d", "k_proj", "k_conv1d")
CHANGES = ("o_scaled", "o_normed")
ABOUT_STEPS = """## What the steps of queries and keys do to the rest

Slopes with everything trained, and with q, k and their convolutions held at their initial values. Δq·k is coherent and
q·k is not, so the scan's output changes relative to itself by up to n^1/2 (derived: `change` of `o_scaled`) until the
norm behind it holds that at Θ(1). What reads `o_normed` after the first step reads something else than before it, by
more at larger widths.
"""
ABOUT_O_PROJ = """
The own step of `o_proj` in numbers (AdamW, step 1): ΔW is coherent with `o_normed` as it was, and is measured at
`o_normed` as it is. A unit vector that has changed by δ keeps 1 - δ²/2 of its direction, so from one width to the next
the own step should shrink by the ratio of these: {}.
"""
ABOUT_ROWS = """## Short rows

Sizes of gradients are geometric means of rows' rms, because rms is unstable where tails are heavy. The logarithm of a
mean of d squares lies below the logarithm of their mean by about (variance over mean²) / 2d: rows of 16 entries look
smaller than they are, those of 128 do not, and slopes come out too large by up to 0.2. Gradients at initialization,
heads of 16 entries at the smallest width:
"""
STEPS = ("b_proj in z_beta", "a_proj in z_a", "A_log", "v_conv1d in v_conv", "o_norm", "o_proj in y")


@dataclass(frozen=True)
class Held(Described):
    """A description of which some parameters are held at their initial values."""

    held: tuple[str, ...] = ()

    def make(self, width: int, seed: int) -> Model:
        model = super().make(width, seed)
        for group in model.optimizer.param_groups:
            if any(group["params"][0] is model.parameters[role] for role in self.held):
                group["lr"] = 0.0
        return model


Job = tuple[Case, tuple[int, ...], int, tuple[str, ...]]
Asked = argparse.Namespace


def one_seed(given: Job) -> Measurements:
    case, widths, seed, held = given
    torch.set_num_threads(1)
    graph, table = case.derived()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    subject = Held(graph, table, widths[0], sizes=case.sizes, device=device, held=held)
    return measure(subject, widths, [seed], steps=2)


def run(optimizer: str, asked: Asked, held: tuple[str, ...]) -> tuple[Measurements, list[Result]]:
    case, widths = Case(optimizer, "heads-fixed", silu=asked.long, tied=False, long=asked.long), tuple(asked.widths)
    found = Measurements(widths)
    with get_context("spawn").Pool(asked.jobs) as pool:
        for part in pool.imap(one_seed, [(case, widths, FIRST + seed, held) for seed in range(asked.seeds)]):
            found.join(part)
    graph, table = case.derived()
    predicted = predictions(graph, table, case.assumed)
    return found, list(results(found, predicted, 2, follows_gradient=follows_gradient(optimizer)))


def slope_of(made: list[Result], kind: str, name: str, step: int) -> str:
    slope = next(each.slope for each in made if (each.kind, each.name, each.step) == (kind, name, step))
    return f"{slope.value:+.2f} ± {slope.error:.2f}"


def queries_and_keys(asked: Asked) -> None:
    print(ABOUT_STEPS)
    print("| | | step | derived | SGD | q and k held | AdamW | q and k held |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    runs = [run(optimizer, asked, held)[1] for optimizer in ("sgd", "adamw") for held in ((), QUERIES_AND_KEYS)]
    for kind, names in (("change", CHANGES), ("own step", STEPS)):
        for name in names:
            for step in (1, 2):
                derived = "≤ 1/2" if name == "o_scaled" else "≤ 0" if kind == "change" else "0"
                cells = " | ".join(slope_of(made, kind, name, step) for made in runs)
                print(f"| {kind} | `{name}` | {step} | {derived} | {cells} |")
    size = {
        (kind, name): next(each.sizes for each in runs[2] if (each.kind, each.name, each.step) == (kind, name, 1))
        for kind, name in (("change", "o_normed"), ("own step", "o_proj in y"))
    }
    turned = [1 - change**2 / 2 for change in size["change", "o_normed"]]
    ratios = zip(pairwise(size["own step", "o_proj in y"]), pairwise(turned), strict=True)
    told = "; ".join(f"{b / a:.2f} where {d / c:.2f} follows" for (a, b), (c, d) in ratios)
    print(ABOUT_O_PROJ.format(told))


def short_rows(asked: Asked) -> None:
    print(ABOUT_ROWS)
    found, _ = run("sgd", asked, ())
    print("| gradient of | derived | geometric mean of rows | rms |\n|---|---:|---:|---:|")
    for name, derived in (("o_normed", "-1"), ("z_g", "-1"), ("k_normed", "-1/2"), ("q_normed", "-1/2")):
        slopes = (fit(asked.widths, found.rows("gradient", name, 0, each)) for each in ("typical", "rms"))
        cells = " | ".join(f"{each.value:+.2f} ± {each.error:.2f}" for each in slopes)
        print(f"| `{name}` | {derived} | {cells} |")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--jobs", type=int, default=1, help="processes; they share a GPU if there is one")
    parser.add_argument("--long", action="store_true", help="long heads and SiLU on")
    asked = parser.parse_args()
    command = " ".join(["python bench/coord_check_why.py", *sys.argv[1:]])
    print("# What drifts with heads fixed, and why\n")
    print(
        f"`{command}`: {'long heads, SiLU on' if asked.long else 'short heads, SiLU off'}, untied, widths "
        f"{asked.widths}, {asked.seeds} "
        f"seeds, as in [coord_check.md](coord_check.md). torch {torch.__version__}, Python "
        f"{platform.python_version()}.\n"
    )
    queries_and_keys(asked)
    if not asked.long:
        short_rows(asked)


if __name__ == "__main__":
    main()
