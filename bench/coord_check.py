"""Every predicted exponent of Gated DeltaNet against training: scalings, AdamW and SGD, SiLU on and off, tied and not.

python bench/coord_check.py --jobs 2                                              # five minutes on two idle CPU cores
python bench/coord_check.py --name wide --widths 512 1024 2048 4096 --jobs 5      # on a GPU, some minutes

Head dims stay on one side of the crossover that the engine names for q·k after SiLU (d_k ≈ 278): *short* heads have 16
entries at the smallest width, *long* ones 1024, and are held against the rules past the crossover. The data file is
written anew after each configuration, so that an interruption loses one.
"""

import argparse
import itertools
import json
import platform
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import inf
from multiprocessing import get_context
from pathlib import Path

import torch

from widthwise.codegen.request import Request
from widthwise.derive import Graph, RuleTable, derive
from widthwise.derive.assume import SETS, Assumptions
from widthwise.verify.coord.check import Report
from widthwise.verify.coord.described import Described
from widthwise.verify.coord.files import rounded
from widthwise.verify.coord.predict import follows_gradient, predictions
from widthwise.verify.coord.run import Measurements, measure
from widthwise.verify.coord.show import table_row
from widthwise.verify.coord.stats import Result, Slope, results

EXACT = ("forward", "gradient", "weight", "weight gradient", "step", "own step")  # the others are bounds
TOLD = ("weight", "step")  # what the rules themselves set, and no model could miss
SHORT = {"H": 16, "d_k": 16, "d_v": 16}  # at the smallest width, heads fixed
LONG = {"H": 4, "d_k": 1024, "d_v": 32}
# Signs and norms as at initialization, and means of nonlinearities taken over: what the asymptotic regime says of q·k.
# (It also takes forward · backward as aligned, which is training's doing and not there at the first steps.)
PAST = replace(SETS["at-init"], nonlinear_mean="coherent")
FIRST, STEPS = 1000, 2


@dataclass(frozen=True)
class Case:
    """One configuration."""

    optimizer: str
    scaling: str
    silu: bool
    tied: bool
    long: bool = False

    @property
    def title(self) -> str:
        heads = "head dims fixed" if self.scaling == "head-dim-fixed" else f"{'long' if self.long else 'short'} heads"
        silu, tied = "on" if self.silu else "off", "tied" if self.tied else "untied"
        return f"{self.optimizer}, {heads}, SiLU {silu}, {tied}"

    @property
    def sizes(self) -> dict[str, int]:
        if self.scaling == "head-dim-fixed":
            return {}
        return LONG if self.long else SHORT

    @property
    def assumed(self) -> Assumptions:
        return PAST if self.long else SETS["at-init"]

    def derived(self) -> tuple[Graph, RuleTable]:
        options = (f"activation={'on' if self.silu else 'off'}",)
        graph = Request("gated_deltanet", self.optimizer, self.scaling, tied=self.tied, options=options).graph()
        return graph, derive(graph, self.optimizer, self.assumed)


def cases(optimizers: list[str]) -> Iterator[Case]:
    """All of them; without SiLU q·k has no mean, and no crossover to be on either side of."""
    for optimizer, silu, tied in itertools.product(optimizers, (True, False), (False, True)):
        yield Case(optimizer, "heads-fixed", silu, tied)
        if silu:
            yield Case(optimizer, "heads-fixed", silu, tied, long=True)
        yield Case(optimizer, "head-dim-fixed", silu, tied)


def one_seed(given: tuple[Case, tuple[int, ...], int, float | None, str]) -> Measurements:
    case, widths, seed, lr, device = given
    torch.set_num_threads(1)
    graph, table = case.derived()
    subject = Described(graph, table, widths[0], sizes=case.sizes, lr=lr, device=device)
    found = measure(subject, widths, [seed], steps=STEPS)
    if device == "cuda":
        torch.cuda.empty_cache()  # several processes share its memory
    return found


def report(case: Case, widths: tuple[int, ...], seeds: list[Measurements]) -> Report:
    graph, table = case.derived()
    found = Measurements(widths)
    for each in seeds:
        found.join(each)
    held = results(
        found,
        predictions(graph, table, case.assumed),
        STEPS,
        follows_gradient=follows_gradient(case.optimizer),
    )
    return Report(case.title, table.hash, widths, len(seeds), STEPS, held, {})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--optimizers", nargs="+", default=["adamw", "sgd"])
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--lr", type=float, help="at the smallest width, instead of the usual")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="WORD", help="configurations with these in their title"
    )
    parser.add_argument("--resume", action="store_true", help="go on with what the data file lacks")
    parser.add_argument("--jobs", type=int, default=2, help="processes; they share a GPU if there is one")
    parser.add_argument("--name", default="cpu", help="of the files")
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--read", action="store_true", help="tell of a run again from its data file")
    asked = parser.parse_args()
    data = asked.output / f"coord_check_{asked.name}.json"
    if asked.read:
        head, reports = read(data)
        data.with_suffix(".md").write_text(text(head, reports), encoding="utf-8")
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    command = "python bench/coord_check.py " + " ".join(asked_for(sys.argv[1:]))
    head = (
        f"`{command}`: one layer, widths {asked.widths}, {asked.seeds} seeds, {STEPS} steps on one batch of 2 × 8 "
        f"random tokens, float32; slope of log size against log width ± standard error over seeds. {where}, torch "
        f"{torch.__version__}, Python {platform.python_version()}."
    )
    widths = tuple(asked.widths)
    reports: list[Report] = []
    if asked.resume:
        before, reports = read(data)
        if before != head:
            parser.error(f"{data} is of another run:\n{before}\nthis one is\n{head}")
    done_before = {each.title for each in reports}
    chosen = [case for case in cases(asked.optimizers) if case.title not in done_before]
    chosen = [case for case in chosen if set(asked.only) <= set(case.title.replace(",", "").split())]
    jobs = [(case, widths, FIRST + seed, asked.lr, device) for case in chosen for seed in range(asked.seeds)]
    asked.output.mkdir(parents=True, exist_ok=True)
    with get_context("spawn").Pool(asked.jobs) as pool:
        done = pool.imap(one_seed, jobs)
        for case in chosen:
            reports.append(report(case, widths, list(itertools.islice(done, asked.seeds))))
            print(case.title, reports[-1].counts, flush=True)
            plain = [each.as_dict() | {"curves": None, "meaning": None} for each in reports]
            numbers = json.dumps(rounded({"head": head, "reports": plain}, 4), separators=(",", ":"))
            data.write_text(numbers + "\n", encoding="utf-8")
            data.with_suffix(".md").write_text(text(head, reports), encoding="utf-8")


def asked_for(words: list[str]) -> list[str]:
    """The arguments of a command but for where its files went, and whether they were there."""
    kept = [word for before, word in itertools.pairwise(["", *words]) if "--output" not in (before, word)]
    return [word for word in kept if word != "--resume"]


def text(head: str, reports: list[Report]) -> str:
    """The page: how many predictions agree, and each that does not."""
    lines = ["# Coordinate check: derived and measured", "", head, ""]
    lines += ["What is not ok, and why: [coord_check.md](coord_check.md).", ""]
    lines += [
        "| | exact predictions | ok | drift | unresolved | fail | bounds held |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    total: Counter[str] = Counter()
    told = 0
    for each in reports:
        exact = Counter(result.verdict for result in each.results if result.kind in EXACT)
        told += sum(result.kind in TOLD and result.verdict == "ok" for result in each.results)
        bounds = [result for result in each.results if result.bound]
        held = sum(result.verdict == "ok" for result in bounds)
        total.update(exact)
        lines.append(
            f"| {each.title} | {exact.total()} | {100 * exact['ok'] / exact.total():.1f}% | {exact['drift']} "
            f"| {exact['unresolved']} | {exact['fail']} | {held} of {len(bounds)} |"
        )
    share, rest = total["ok"] / total.total(), (total["ok"] - told) / (total.total() - told)
    lines += [
        "",
        f"All: {total['ok']} of {total.total()} exact predictions agree within 0.1 or two standard errors "
        f"({100 * share:.1f}%); {100 * rest:.1f}% without the init stds and learning rates, which the rules themselves "
        f"set. {total['fail']} fail.",
        "",
    ]
    for each in reports:
        lines += [f"## {each.title}", "", "| | what | of | step | derived | measured | at the two largest widths |"]
        lines += ["|---|---|---|---|---:|---:|---:|"]
        lines += [table_row(result) for result in each.results if result.verdict != "ok"]
        lines.append("")
    return "\n".join(lines)


def read(path: Path) -> tuple[str, list[Report]]:
    """What a run has written."""
    reports = []
    found = json.loads(path.read_text(encoding="utf-8"))
    for plain in found["reports"]:
        held = [each | {"slope": Slope(**_numbers(each["slope"]))} for each in plain["results"]]
        widths, held = tuple(plain["widths"]), tuple(Result(**each) for each in held)
        reports.append(Report(plain["title"], plain["rules"], widths, plain["seeds"], plain["steps"], held, {}))
    return found["head"], reports


def _numbers(slope: dict[str, float | None]) -> dict[str, float]:
    return {key: inf if value is None else value for key, value in slope.items()}


if __name__ == "__main__":
    main()
