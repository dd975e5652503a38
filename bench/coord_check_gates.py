"""The gates of Gated DeltaNet in training: which rule describes them under SGD, and whether their published init is stable.

python bench/coord_check_gates.py --jobs 2                                       # half an hour on two idle CPU cores
python bench/coord_check_gates.py --widths 256 512 1024 2048 4096 --seeds 4 --jobs 12 --parts training      # on a GPU

Prints the page; parts appear as they are done.
"""  # noqa: E501

import argparse
import itertools
import platform
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from math import inf
from multiprocessing import get_context

import torch
from torch import Tensor

from widthwise.codegen.request import Request
from widthwise.verify.coord.alignment import Alignment, Halves, alignments, watch
from widthwise.verify.coord.described import Described
from widthwise.verify.coord.run import Measurements, measure
from widthwise.verify.coord.stats import Slope, fit
from widthwise.verify.coord.subject import mixed
from widthwise.verify.data import VOCABULARY, corpus

PARTS = ("facts", "init", "training")
STEPS = (0, 1, 20, 200, 1000)
BASE = 64  # where learning rates are those given
HEAD_DIM = 16  # at the smallest width: short of q·k's crossover up to sixteen times that width
PUBLISHED = ("a_proj.init_std=-1/2", "b_proj.init_std=-1/2")


text_of_python = cache(corpus)


def batches(seed: int, length: int = 8, size: int = 8) -> Iterator[dict[str, Tensor]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for tokens, targets in text_of_python().batches(size, length, mixed(seed, "text")):
        yield {"tokens": tokens.to(device), "targets": targets.to(device)}


def subject(
    optimizer: str, smallest: int, fix: tuple[str, ...] = (), lr: float | None = None, scaling: str = "heads-fixed"
) -> Described:
    request = Request("gated_deltanet", optimizer, scaling, fix=fix)
    graph = request.graph()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    fixed = scaling == "heads-fixed"
    dim = HEAD_DIM * BASE // smallest if fixed else HEAD_DIM
    sizes = {"vocab": VOCABULARY, "d_k": dim, "d_v": dim, "H": (smallest if fixed else BASE) // HEAD_DIM}
    return Described(graph, request.table(graph), BASE, sizes=sizes, lr=lr, device=device)


@dataclass(frozen=True)
class Setting:
    """One training run: its optimizer, scaling, gate init, learning rate."""

    optimizer: str
    scaling: str
    lr: float
    fix: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        init = "published" if self.fix else "derived"
        return f"{self.optimizer}, {self.scaling}, gate init as {init}, learning rate {self.lr}"


SETTINGS = (
    Setting("sgd", "heads-fixed", 0.3),
    Setting("sgd", "head-dim-fixed", 0.3),
    Setting("adamw", "heads-fixed", 2e-3, PUBLISHED),
)
ROLES = ("a_proj", "b_proj", "A_log", "dt_bias", "o_norm")


Job = tuple[Setting, int, int, int, tuple[int, ...]]


def one(given: Job) -> tuple[Measurements, Halves]:
    """Train one model of a sweep that starts at ``smallest``."""
    setting, smallest, width, seed, steps = given
    torch.set_num_threads(1)
    described = subject(setting.optimizer, smallest, setting.fix, setting.lr, setting.scaling)
    found = watch(described, [width], [seed], steps, batches=batches)
    print(setting.title, "· width", width, "· seed", seed, file=sys.stderr, flush=True)
    return found


def text(slope: Slope) -> str:
    return f"{slope.value:+.2f} ± {slope.error:.2f}"


def row(title: str, cells: Iterable[str]) -> None:
    print(f"| {title} | {' | '.join(cells)} |")


def in_training(widths: tuple[int, ...], seeds: int, steps: tuple[int, ...], jobs: int) -> None:
    print("## In training\n")
    print(
        "Bytes of the Python standard library, 8 × 8 a batch. A gradient that stays as it is derived at initialization "
        "keeps its slope (gates: -1/2 with heads fixed, -1 with head dims fixed); the fully aligned rule takes it for "
        "n^1/2 more. Coherence is the slope of a sum over what independent signs would make of it: 0, or 1/2 where "
        "terms agree.\n"
    )
    each = list(itertools.product(range(seeds), widths))
    given = [(setting, widths[0], width, seed, steps) for setting in SETTINGS for seed, width in each]
    with get_context("spawn").Pool(jobs) as pool:
        done = pool.imap(one, given)
        for setting in SETTINGS:
            found, halves = Measurements(widths), Halves()
            for part, known in itertools.islice(done, len(each)):
                found.join(part)
                for key, (half, lengths) in known.items():
                    halves.setdefault(key, (half, {}))[1].update(lengths)
            tell(setting, found, alignments(found, halves, steps), steps)


def tell(setting: Setting, found: Measurements, made: list[Alignment], steps: tuple[int, ...]) -> None:
    widths = found.widths
    print(f"### {setting.title}\n")
    row("", [f"step {step}" for step in steps])
    print("|---|" + "---:|" * len(steps))
    for role in ROLES:
        slopes = [fit(widths, found.rows("weight gradient", role, step, "rms")) for step in steps]
        row(f"slope of ∂L/∂{role} (rms)", map(text, slopes))
        row("at the two largest widths", [f"{each.local:+.2f} ± {each.local_error:.2f}" for each in slopes])
    for kind, name in dict.fromkeys((each.kind, each.name) for each in made):
        if kind == "own step" or (kind == "upstream" and name[:6] not in ("a_proj", "b_proj")):
            continue
        cells = {each.step: each for each in made if (each.kind, each.name) == (kind, name)}
        told = [cells.get(step) for step in steps]
        row(f"coherence of {kind}, {name}", ["" if each is None else text(each.slope) for each in told])
        row(f"its ratio at width {widths[-1]}", ["" if each is None else f"{each.ratio:.2f}" for each in told])
        reach = ["" if each is None or each.crossover == inf else f"{each.crossover:.2g}" for each in told]
        row("coherent part rules from width", reach)
    losses = {step: found.means("loss", "loss", step, "value") for step in steps}
    for index, width in enumerate(widths):
        row(f"loss at width {width}", [f"{losses[step][index]:.3f}" for step in steps])
    print(flush=True)


def published_init(widths: tuple[int, ...], seeds: int) -> None:
    print("## The published init of the gate matrices\n")
    print(
        f"AdamW, heads fixed, {seeds} seeds: W_α, W_β drawn as n^-1/2 (Liu & Gu 2026) and as derived, n^-1. What "
        "the first two steps change in a gate's input: slopes in n of W₀·Δh, of its coherent part (the mean over "
        "tokens) and of the rest, and of the gate's own step.\n"
    )
    print("| init | gate | step | W₀·Δh | coherent | incoherent | own step | W₀·Δh over own step at the widest |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for name, fix in (("published", PUBLISHED), ("derived", ())):
        found = measure(subject("adamw", widths[0], fix), widths, range(seeds))
        for gate in ("b_proj in z_beta", "a_proj in z_a"):
            for step in (1, 2):
                cells = [
                    text(fit(widths, found.rows(kind, gate, step, statistic)))
                    for kind, statistic in (
                        ("upstream", "rms"), ("upstream", "coherent"), ("upstream", "incoherent"), ("own step", "rms"),
                    )
                ]  # fmt: skip
                ratio = (
                    found.average("upstream", gate, step, "rms")[-1] / found.average("own step", gate, step, "rms")[-1]
                )
                print(f"| {name} | {gate} | {step} | {' | '.join(cells)} | {ratio:.2f} |")
    print(flush=True)


def known_facts(widths: tuple[int, ...], seeds: int) -> None:
    print("## Facts known from elsewhere, again\n")
    print("| what | known | here |\n|---|---|---|")
    for silu, known in (("off", "-0.45"), ("on", "bends toward 0")):
        request = Request("gated_deltanet", options=(f"activation={silu}",))
        graph = request.graph()
        found = measure(Described(graph, request.table(graph), widths[0]), widths, range(seeds), steps=1)
        slope = fit(widths, found.rows("forward", "o", 0, "rms"))
        local = f"{text(slope)}; {slope.local:+.2f} ± {slope.local_error:.2f} at the two largest widths"
        print(f"| scan output, SiLU {silu} | {known} | {local} |")
    for scaling, known in (("heads-fixed", "-1/2"), ("head-dim-fixed", "-1")):
        found = measure(subject("adamw", widths[0], scaling=scaling), widths, range(seeds), steps=1)
        print(
            f"| ∂L/∂(W_α h), {scaling} | {known} | {text(fit(widths, found.rows('gradient', 'z_a', 0, 'entries')))} |"
        )
    request = Request("gated_deltanet", options=("o_scale=off", "qk_scale=d_k^-1/2"))
    graph = request.graph()
    for eps in (1e-5, 0.0):
        run = Described(graph, request.table(graph), widths[0], norm_eps=eps)
        wide = (64, 256, 1024, 2048)
        sizes = measure(run, wide, range(2), steps=1).average("forward", "o_normed", 0, "rms")
        told = ", ".join(f"{size:.2f} at {width}" for size, width in zip(sizes, wide, strict=True))
        print(f"| normed output with scale d_k^-1/2, eps {eps:g} | falls: 0.97 at 64, 0.47 at 2048 | {told} |")
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS))
    parser.add_argument("--jobs", type=int, default=2, help="processes of the part in training")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    asked = parser.parse_args()
    command = " ".join(["python bench/coord_check_gates.py", *sys.argv[1:]])
    widths = tuple(asked.widths)
    print("# The gates of Gated DeltaNet, measured\n")
    print(
        f"`{command}`: one layer, widths {asked.widths}, {asked.seeds} seeds in training and "
        f"{5 * asked.seeds} else; slopes of log size against log width ± standard error over seeds. torch "
        f"{torch.__version__}, Python {platform.python_version()}.\n",
        flush=True,
    )
    if "facts" in asked.parts:
        known_facts(widths, 5 * asked.seeds)
    if "init" in asked.parts:
        published_init(widths, 5 * asked.seeds)
    if "training" in asked.parts:
        in_training(widths, asked.seeds, tuple(asked.steps), asked.jobs)


if __name__ == "__main__":
    main()
