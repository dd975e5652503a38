"""Does the coordinate check see what it is for? Each knob of each role off by n^±1/2; and correct rules, fifty times.

python bench/coord_check_faults.py > docs/results/coord_check_faults.md     # seven minutes on two idle CPU cores
"""

import json
import platform
import sys
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


def job(given: tuple[str, str, int]) -> tuple[str, str, Report]:
    """One check: of a fault by name, or of the correct rules (no name)."""
    optimizer, name, first = given
    torch.set_num_threads(1)
    graph = architecture("gated_deltanet")
    right = derive(graph, optimizer)
    wrong = dict(faults(graph, right))[name] if name else right
    return optimizer, name, run(graph, right, wrong, first)


def main() -> None:
    graph = architecture("gated_deltanet")
    jobs = []
    for optimizer in ("adamw", "sgd"):
        names = [name for name, _ in faults(graph, derive(graph, optimizer))] + [""] * AGAIN
        jobs += [(optimizer, name, FIRST + SEEDS * place) for place, name in enumerate(names)]
    reports = []
    with get_context("spawn").Pool(4) as pool:
        for done in pool.imap_unordered(job, jobs):
            reports.append(done)
            print(
                f"{len(reports)} of {len(jobs)}: {done[0]} {done[1]} {len(failed(done[2]))}",
                file=sys.stderr,
                flush=True,
            )
    print("# What the coordinate check catches\n")
    print(
        f"`python bench/coord_check_faults.py`: Gated DeltaNet, heads fixed, widths {list(WIDTHS)}, {SEEDS} seeds, 2 "
        f"steps: the defaults of `widthwise coord-check --graph`, on seeds that no threshold was chosen with. torch "
        f"{torch.__version__}, Python {platform.python_version()}.\n"
    )
    data = {
        optimizer: tell(optimizer, [each[1:] for each in reports if each[0] == optimizer])
        for optimizer in ("adamw", "sgd")
    }
    Path("docs/results/coord_check_faults.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def tell(optimizer: str, reports: list[tuple[str, Report]]) -> dict[str, object]:
    """Print what was caught and what was not; everything, for the file."""
    caught = {name: failed(report) for name, report in sorted(reports, key=lambda each: each[0]) if name}
    slipped = [name for name, seen in caught.items() if not seen]
    alone = [name for name, seen in caught.items() if all(each.kind in DIRECT for each in seen)]
    correct = [report for name, report in reports if not name]
    alarms = [[text(each) for each in failed(report)] for report in correct if failed(report)]
    verdicts = Counter(each.verdict for report in correct for each in report.results)
    print(f"## {optimizer}\n")
    print(f"* Faults of n^±1/2 in one knob of one role: {len(caught)}. Caught: {len(caught) - len(slipped)}.")
    print(f"* Caught by what they do, not counting the lines that show the knob itself: {len(caught) - len(alone)}.")
    print(f"* Slipped through: {', '.join(slipped) or 'none'}.")
    print(f"* Seen in the knob's own line alone: {', '.join(alone) or 'none'}.")
    share = ", ".join(f"{100 * count / verdicts.total():.1f}% {each}" for each, count in verdicts.most_common())
    print(f"* Correct rules, {len(correct)} times: {len(alarms)} false alarms. Of all verdicts {share}.")
    for seen_then in alarms:
        print(f"  * {'; '.join(seen_then)}")
    print(flush=True)
    return {"caught": {name: [text(each) for each in seen] for name, seen in caught.items()}, "alarms": alarms}


if __name__ == "__main__":
    main()
