"""Does the coordinate check see what it is for? Each knob of each role off by n^±1/2; and correct rules, fifty times.

python bench/coord_check_faults.py --jobs 16     # two minutes on sixteen CPU cores, a quarter of an hour on two
"""

import argparse
import json
import platform
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import torch

from widthwise.derive import Graph, RuleTable, architecture, derive
from widthwise.derive.exponents import HALF, ZERO
from widthwise.verify.coord.check import Report, coordinate_check
from widthwise.verify.coord.described import Described
from widthwise.verify.coord.predict import follows_gradient, predictions
from widthwise.verify.coord.show import power
from widthwise.verify.coord.stats import Result

WIDTHS, SEEDS, BASE, AGAIN = (64, 128, 256), 10, 64, 50
KNOBS = ("init_std", "lr", "multiplier")
DIRECT = ("weight", "step")  # what shows a knob itself, rather than what it does
FIRST = 10_000  # seeds that nothing was tuned with


def faults(graph: Graph, table: RuleTable) -> Iterator[tuple[str, RuleTable]]:
    """Every table with one knob off by a half, with what is off."""
    for index, rule in enumerate(table.rules):
        ops = {node.op for node, _ in graph.consumers(rule.role)}
        multiplies = rule.role not in graph.parameters or ops & {"linear", "conv1d", "embedding"}
        for knob in KNOBS:
            value = getattr(rule, knob)
            if value is None or (knob == "multiplier" and not multiplies):
                continue
            for by in (HALF, -HALF):
                wrong = replace(rule, **{knob: value + by})
                rules = (*table.rules[:index], wrong, *table.rules[index + 1 :])
                yield f"{rule.role}.{knob} {'+' if by > ZERO else '-'}1/2", replace(table, rules=rules)


def run(graph: Graph, right: RuleTable, used: RuleTable, first: int) -> Report:
    """Check ``used`` against what ``right`` predicts."""
    return coordinate_check(
        Described(graph, used, BASE),
        predictions(graph, right),
        WIDTHS,
        seeds=range(first, first + SEEDS),
        follows_gradient=follows_gradient(right.optimizer),
    )


def failed(report: Report) -> list[Result]:
    return [each for each in report.results if each.verdict == "fail"]


def text(each: Result) -> str:
    return f"{each.kind} {each.name} ({power(each.predicted)}: {each.slope.value:+.2f} ± {each.slope.error:.2f})"


Job = tuple[str, str, str, int]


def job(given: Job) -> tuple[Job, Report]:
    """One check: of a fault by name, or of the correct rules (no name)."""
    optimizer, scaling, name, first = given
    torch.set_num_threads(1)
    graph = architecture("gated_deltanet", scaling=scaling)
    right = derive(graph, optimizer)
    wrong = dict(faults(graph, right))[name] if name else right
    return given, run(graph, right, wrong, first)


def jobs_of(optimizer: str, scaling: str, again: int) -> list[Job]:
    graph = architecture("gated_deltanet", scaling=scaling)
    names = [name for name, _ in faults(graph, derive(graph, optimizer))] + [""] * again
    return [(optimizer, scaling, name, FIRST + SEEDS * place) for place, name in enumerate(names)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--scalings", nargs="+", default=["heads-fixed", "head-dim-fixed"])
    parser.add_argument("--again", type=int, default=AGAIN, help="runs of the correct rules")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    asked = parser.parse_args()
    asked.output.mkdir(parents=True, exist_ok=True)
    page, data = (asked.output / f"coord_check_faults.{kind}" for kind in ("md", "json"))
    text = (
        "# What the coordinate check catches\n\n"
        f"`python bench/coord_check_faults.py`: Gated DeltaNet, widths {list(WIDTHS)}, {SEEDS} seeds, 2 steps: the "
        f"defaults of `widthwise coord-check --graph`, on seeds that no threshold was chosen with. torch "
        f"{torch.__version__}, Python {platform.python_version()}. What slips through, and why: "
        "[coord_check.md](coord_check.md#planted-faults).\n"
    )
    found = {}
    with get_context("spawn").Pool(asked.jobs) as pool:
        for scaling in asked.scalings:
            for optimizer in ("adamw", "sgd"):
                reports = pool.map(job, jobs_of(optimizer, scaling, asked.again), chunksize=1)
                part, found[f"{optimizer}, {scaling}"] = told(
                    optimizer, scaling, [(given[2], report) for given, report in reports]
                )
                text += part
                print(part, flush=True)
                page.write_text(text, encoding="utf-8")
                data.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def told(optimizer: str, scaling: str, reports: list[tuple[str, Report]]) -> tuple[str, dict[str, object]]:
    """What was caught and what was not, in words; and everything, for the file."""
    caught = {name: failed(report) for name, report in sorted(reports, key=lambda each: each[0]) if name}
    slipped = [name for name, seen in caught.items() if not seen]
    alone = [name for name, seen in caught.items() if seen and all(each.kind in DIRECT for each in seen)]
    correct = [report for name, report in reports if not name]
    alarms = [[text(each) for each in failed(report)] for report in correct if failed(report)]
    verdicts = Counter(each.verdict for report in correct for each in report.results)
    share = ", ".join(f"{100 * count / verdicts.total():.1f}% {each}" for each, count in verdicts.most_common())
    lines = [
        f"\n## {optimizer}, {scaling}\n",
        f"* Faults of n^±1/2 in one knob of one role: {len(caught)}. Caught: {len(caught) - len(slipped)}.",
        "* Caught by what they do, not counting the lines that show the knob itself: "
        f"{len(caught) - len(alone) - len(slipped)}.",
        f"* Slipped through: {', '.join(slipped) or 'none'}.",
        f"* Seen in the knob's own line alone: {', '.join(alone) or 'none'}.",
        f"* Correct rules, {len(correct)} times: {len(alarms)} false alarms. Of all verdicts {share}.",
        *(f"  * {'; '.join(seen_then)}" for seen_then in alarms),
    ]
    everything = {"caught": {name: [text(each) for each in seen] for name, seen in caught.items()}, "alarms": alarms}
    return "\n".join(lines) + "\n", everything


if __name__ == "__main__":
    main()
