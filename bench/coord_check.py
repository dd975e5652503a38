"""Every predicted exponent of Gated DeltaNet against training: both scalings, AdamW and SGD, SiLU on and off, tied and not.

python bench/coord_check.py > docs/results/coord_check.md                 # ten minutes on two idle CPU cores
python bench/coord_check.py --widths 256 512 1024 2048 4096 --optimizers adamw --seeds 3 --plain --name wide
"""  # noqa: E501

import argparse
import itertools
import json
import platform
import sys
from collections import Counter
from multiprocessing import get_context
from pathlib import Path

import torch

from widthwise.codegen.request import Request
from widthwise.verify.coord.check import Report, coordinate_check
from widthwise.verify.coord.described import Described
from widthwise.verify.coord.files import rounded
from widthwise.verify.coord.predict import follows_gradient, predictions
from widthwise.verify.coord.show import power
from widthwise.verify.coord.stats import Result

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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--optimizers", nargs="+", default=["adamw", "sgd"])
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--name", default="cpu", help="of the data file")
    parser.add_argument("--plain", action="store_true", help="SiLU on and untied alone")
    asked = parser.parse_args()
    command = " ".join(["python bench/coord_check.py", *sys.argv[1:]])
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
    print("# Coordinate check: derived and measured\n")
    print(
        f"`{command}`: one layer, widths {asked.widths}, {asked.seeds} seeds, 2 steps on one batch "
        f"of 2 × 8 random tokens, float32, {device}; slope of log size "
        f"against log width ± standard error over seeds. torch {torch.__version__}, Python "
        f"{platform.python_version()}.\n"
    )
    tell([report for _, report in reports])
    data = [rounded(report.as_dict() | {"curves": None}) for _, report in reports]
    Path(f"docs/results/coord_check_{asked.name}.json").write_text(json.dumps(data) + "\n", encoding="utf-8")


def tell(reports: list[Report]) -> None:
    total: Counter[str] = Counter()
    print("| | exact predictions | ok | drift | unresolved | fail | bounds held |\n|---|---:|---:|---:|---:|---:|---:|")
    for report in reports:
        exact = Counter(each.verdict for each in report.results if each.kind in EXACT)
        bounds = [each for each in report.results if each.bound]
        held = sum(each.verdict == "ok" for each in bounds)
        total.update(exact)
        print(
            f"| {report.title} | {exact.total()} | {100 * exact['ok'] / exact.total():.1f}% | {exact['drift']} "
            f"| {exact['unresolved']} | {exact['fail']} | {held} of {len(bounds)} |"
        )
    print(
        f"\nAll: {total['ok']} of {total.total()} exact predictions agree ({100 * total['ok'] / total.total():.1f}%).\n"
    )
    for report in reports:
        print(f"## {report.title}\n")
        print(
            "| | what | of | step | derived | measured | at the two largest widths |\n|---|---|---|---|---:|---:|---:|"
        )
        for each in report.results:
            if each.verdict != "ok":
                print(line(each))
        print()


if __name__ == "__main__":
    main()
