"""Every predicted exponent of Gated DeltaNet against training: scalings, AdamW and SGD, SiLU on and off, tied and not.

python bench/coord_check.py > docs/results/coord_check.md                 # ten minutes on two idle CPU cores
python bench/coord_check.py --widths 256 512 1024 2048 4096 --optimizers adamw --seeds 3 --plain --name wide
"""

import argparse
import itertools
import json
import platform
import sys
from collections import Counter
from math import inf
from multiprocessing import get_context
from pathlib import Path

import torch

from widthwise.codegen.request import Request
from widthwise.verify.coord.check import Report, coordinate_check
from widthwise.verify.coord.described import Described
from widthwise.verify.coord.files import rounded
from widthwise.verify.coord.predict import follows_gradient, predictions
from widthwise.verify.coord.show import power
from widthwise.verify.coord.stats import Result, Slope

EXACT = ("forward", "gradient", "weight", "weight gradient", "step", "own step")  # the others are bounds
Job = tuple[str, str, bool, bool, tuple[int, ...], int, str]


def job(given: Job) -> tuple[Job, Report]:
    optimizer, scaling, silu, tied, widths, seeds, device = given
    if device == "cpu":
        torch.set_num_threads(1)
    request = Request(
        "gated_deltanet", optimizer, scaling, tied=tied, options=(f"activation={'on' if silu else 'off'}",)
    )
    graph = request.graph()
    table = request.table(graph)
    report = coordinate_check(
        Described(graph, table, widths[0], device=device),
        predictions(graph, table),
        widths,
        title=title(given),
        rules=table.hash,
        seeds=range(1000, 1000 + seeds),
        follows_gradient=follows_gradient(optimizer),
    )
    return given, report


def title(given: Job) -> str:
    optimizer, scaling, silu, tied = given[:4]
    return f"{optimizer}, {scaling}, SiLU {'on' if silu else 'off'}, {'tied' if tied else 'untied'}"


def line(each: Result) -> str:
    slope, bound = each.slope, "≤ " * each.bound
    return (
        f"| {each.verdict} | {each.kind} | `{each.name}` | {each.step} | {bound}{power(each.predicted)} "
        f"| {slope.value:+.2f} ± {slope.error:.2f} | {slope.local:+.2f} ± {slope.local_error:.2f} |"
    )


def head(command: str, reports: list[Report]) -> None:
    print("# Coordinate check: derived and measured\n")
    print(
        f"`{command}`: one layer, widths {list(reports[0].widths)}, {reports[0].seeds} seeds, 2 steps on one batch of "
        f"2 × 8 random tokens, float32; slope of log size against log width ± standard error over seeds. torch "
        f"{torch.__version__}, Python {platform.python_version()}.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--optimizers", nargs="+", default=["adamw", "sgd"])
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--name", default="cpu", help="of the data file")
    parser.add_argument("--read", type=Path, metavar="FILE", help="tell of a run again from its data file")
    parser.add_argument("--plain", action="store_true", help="SiLU on and untied alone")
    asked = parser.parse_args()
    command = " ".join(["python bench/coord_check.py", *sys.argv[1:]])
    if asked.read:
        head(f"python bench/coord_check.py (data: {asked.read.name})", reports := read(asked.read))
        tell(reports)
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    choices = itertools.product(asked.optimizers, ("heads-fixed", "head-dim-fixed"), (True, False), (False, True))
    if asked.plain:
        choices = itertools.product(asked.optimizers, ("heads-fixed", "head-dim-fixed"), (True,), (False,))
    jobs: list[Job] = [(*choice, tuple(asked.widths), asked.seeds, device) for choice in choices]
    reports = []
    with get_context("spawn").Pool(2 if device == "cpu" else 1) as pool:
        for done in pool.imap(job, jobs):
            reports.append(done)
            print(f"{len(reports)} of {len(jobs)}: {done[1].title} {done[1].counts}", file=sys.stderr, flush=True)
    head(command, [report for _, report in reports])
    tell([report for _, report in reports])
    data = [rounded(report.as_dict() | {"curves": None, "meaning": None}, 4) for _, report in reports]
    Path(f"docs/results/coord_check_{asked.name}.json").write_text(json.dumps(data) + "\n", encoding="utf-8")


OFF = """## What is not ok, and why

* **`o`, `o_scaled`, gradients of `o`, `q`, `k` and their weights; SiLU on, heads fixed.** SiLU leaves q·k a mean, and
  with d_k = n/4 the widest model stands at the crossover that the engine names (`nonlinear-coherence`: d_k ≈ 278): `o`
  bends from n^-1/2 toward n^0, and what is divided by its norm bends the other way. Without SiLU `o` has its slope.
* **Own steps of `q`, `k` and their convolutions under SGD; SiLU on, heads fixed.** They follow those gradients.
* **Gradients of `q_normed`, `q`, `q_conv`; SiLU off, heads fixed** (0.1 off). Not explained for certain: ∂L/∂o is
  orthogonal to o because of the norm behind it, which takes away a share of ∂L/∂q that changes while heads are short.
* **Own step of `a_proj`** (and `b_proj`). A step is coherent with the tokens that made it and noise to the others; the
  noise shrinks as n^-1/2 beside it, and counts for more where few tokens dominate a gradient, as they do in a gate's.
  With heads that grow in number, local slopes are within 0.1.
* **`A_log`, `dt_bias`, gradients of the gates.** One number a head, spread over two decades: seeds decide.
* **`logits`, tied.** A token meets itself in a tied readout, coherently; the 63 others are n^-1/2 and still count at
  the smallest width.
* **`o_norm`'s second step under SGD, head dims fixed. Here measurement and rule part.** Its first gradient is the
  incoherent sum over heads that was derived (n^-1/2, hence a learning rate of n^1/2). By the second step the heads have
  aligned, and its own step is up to n^1/2 too large at the widest models (local slopes of 0.3 to 0.5): the branch that
  the engine lists as the `crossover` finding (learning rate n^0) holds from the second step on.
* **Tied readouts start hot. Here, too, measurement and rule part.** The figures here are with a base multiplier of
  1/n_base for a tied readout. With the usual n_base^-1/2, which a generated model has by default, each token's own
  logit is √n_base; gradients then point along what was read, forward and backward are not independent, and ∂L/∂`o_norm`
  is coherent over heads from the start (head dims fixed, widths 64 to 512, 5 seeds: slope +0.01 ± 0.02 where -1/2 is
  derived; -0.46 ± 0.08 with 1/n_base). The derivation assumes a fresh readout, as docs/theory.md says.
* **Bounds, heads fixed.** The change of `o_normed` and of what follows it was said to stay Θ(1); at the first step it
  grows by n^0.1 to n^0.3, and locally no less. The engine has `o` change relative to itself by up to n^1/2 (Δq·k is
  coherent, q·k is not; the measured change of `o_scaled` keeps within that) and counts on the norm behind it, which
  holds a change at Θ(1) only once it is that large: here it is a few hundredths, and on its way there. With head dims
  fixed nothing grows under AdamW; under SGD by up to n^0.2, less at the widest models.
"""
TOLD = ("weight", "step")  # what the rules themselves set, and no model could miss


def tell(reports: list[Report]) -> None:
    total: Counter[str] = Counter()
    told = 0
    print("| | exact predictions | ok | drift | unresolved | fail | bounds held |\n|---|---:|---:|---:|---:|---:|---:|")
    for report in reports:
        exact = Counter(each.verdict for each in report.results if each.kind in EXACT)
        told += sum(each.kind in TOLD and each.verdict == "ok" for each in report.results)
        bounds = [each for each in report.results if each.bound]
        held = sum(each.verdict == "ok" for each in bounds)
        total.update(exact)
        print(
            f"| {report.title} | {exact.total()} | {100 * exact['ok'] / exact.total():.1f}% | {exact['drift']} "
            f"| {exact['unresolved']} | {exact['fail']} | {held} of {len(bounds)} |"
        )
    share, rest = total["ok"] / total.total(), (total["ok"] - told) / (total.total() - told)
    print(
        f"\nAll: {total['ok']} of {total.total()} exact predictions agree within 0.1 or two standard errors "
        f"({100 * share:.1f}%); {100 * rest:.1f}% without the init stds and learning rates, which the rules themselves "
        f"set. {total['fail']} fail.\n"
    )
    print(OFF)
    for report in reports:
        print(f"## {report.title}\n")
        print(
            "| | what | of | step | derived | measured | at the two largest widths |\n|---|---|---|---|---:|---:|---:|"
        )
        for each in report.results:
            if each.verdict != "ok":
                print(line(each))
        print()


def read(path: Path) -> list[Report]:
    """What a run has written."""
    reports = []
    for plain in json.loads(path.read_text(encoding="utf-8")):
        found = [
            Result(
                **each
                | {"slope": Slope(**{key: inf if value is None else value for key, value in each["slope"].items()})}
            )
            for each in plain["results"]
        ]
        widths = tuple(plain["widths"])
        reports.append(Report(plain["title"], plain["rules"], widths, plain["seeds"], plain["steps"], tuple(found), {}))
    return reports


if __name__ == "__main__":
    main()
