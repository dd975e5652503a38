"""A report for people: two tables, a summary, findings in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from math import inf
from typing import TYPE_CHECKING

from widthwise.verify.coord.alignment import SUMS, Alignment, obeys
from widthwise.verify.coord.check import Report
from widthwise.verify.coord.stats import MEANING, Result, Verdict

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

STYLE: dict[Verdict, str] = {"ok": "", "drift": "yellow", "unresolved": "magenta", "fail": "bold red"}
MARK: dict[Verdict, str] = {"ok": "", "drift": " ~", "unresolved": " ?", "fail": " ✗"}


def terminal(report: Report) -> Iterator[RenderableType]:
    """What the command line prints."""
    last = report.steps
    later = [(f"after {last}", last)] if last > 1 else []
    yield from _table(
        report,
        "tensors",
        [("at init", "forward", 0), ("gradient", "gradient", 0), ("change, step 1", "change", 1)]
        + [(f"change, {title}", "change", step) for title, step in later],
    )
    yield from _table(
        report,
        "parameters",
        [("at init", "weight", 0), ("gradient", "weight gradient", 0), ("first step", "step", 1)],
    )
    yield from _table(
        report,
        "what a parameter's steps do (ΔW·x), and what reaches its output from upstream (W₀·Δx)",
        [("ΔW·x, step 1", "own step", 1)]
        + [(f"ΔW·x, {title}", "own step", step) for title, step in later]
        + [("W₀·Δx, step 1", "upstream", 1)]
        + [(f"W₀·Δx, {title}", "upstream", step) for title, step in later],
    )
    yield from summary(report)


def _table(report: Report, title: str, columns: list[tuple[str, str, int]]) -> Iterator[RenderableType]:
    from rich.table import Table

    found = {(each.kind, each.name, each.step): each for each in report.results}
    kinds = {kind for _, kind, _ in columns}
    names = dict.fromkeys(each.name for each in report.results if each.kind in kinds)
    if not names:
        return
    grid = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    grid.add_column("")
    for heading, _, _ in columns:
        grid.add_column(heading, justify="right", no_wrap=True)
    for name in names:
        grid.add_row(name, *(cell(found.get((kind, name, step))) for _, kind, step in columns))
    yield grid


def cell(result: Result | None) -> Text:
    """``-1/2: -0.48 ± 0.01``: the derived exponent, the measured slope, a mark where it is not ok."""
    from rich.text import Text

    if result is None:
        return Text("·", style="dim")
    text = f"{derived(result)}: {result.slope.value:+.2f} ± {result.slope.error:.2f}"
    return Text(text + MARK[result.verdict], style=STYLE[result.verdict])


def derived(result: Result) -> str:
    """``-1/2``; ``≤0`` of a bound; ``-1…0`` of what training raises."""
    low = "≤" if result.bound else "" if result.least is None else f"{power(result.least)}…"
    return low + power(result.predicted)


def table_row(each: Result) -> str:
    """A result as a row in Markdown: verdict, kind, name, step, derived, measured, at the two largest widths."""
    slope = each.slope
    return (
        f"| {each.verdict} | {each.kind} | `{each.name}` | {each.step} | {derived(each)} | {slope.value:+.2f} ± "
        f"{slope.error:.2f} | {slope.local:+.2f} ± {slope.local_error:.2f} |"
    )


def power(exponent: float) -> str:
    """``-1/2``; two decimals where it is no half."""
    halves = round(2 * exponent)
    if abs(2 * exponent - halves) > 1e-9:
        return f"{exponent:.2f}"
    return str(halves // 2) if halves % 2 == 0 else f"{halves}/2"


def summary(report: Report) -> Iterator[RenderableType]:
    """Counts, what they mean, what is not ok with its slope at the largest widths, findings."""
    from rich.text import Text

    total = len(report.results)
    counts = {verdict: count for verdict, count in report.counts.items() if count}
    parts = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    widths = ", ".join(map(str, report.widths))
    yield Text(f"\n{total} predictions: {parts} (widths {widths}; {report.seeds} seeds; {report.steps} steps)", "bold")
    for verdict in counts:
        yield Text(f"  {verdict}{MARK[verdict]}: {MEANING[verdict]}", STYLE[verdict])
    odd = [each for each in report.results if each.verdict != "ok"]
    if odd:
        yield Text(f"\nslopes over all widths, and between {report.widths[-2]} and {report.widths[-1]} alone", "bold")
    for each in sorted(odd, key=lambda each: list(MEANING).index(each.verdict), reverse=True):
        slope = each.slope
        yield Text(
            f"  {each.verdict:10} {each.kind}, {each.name}, step {each.step}: derived {derived(each)}, "
            f"measured {slope.value:+.2f} ± {slope.error:.2f}, "
            f"locally {slope.local:+.2f} ± {slope.local_error:.2f}",
            STYLE[each.verdict],
        )
    if report.findings:
        yield Text("\nfindings", "bold")
    for line in report.findings:
        yield Text(f"  {line}")
    if report.interrupted:
        yield Text(f"\ninterrupted after {report.seeds} seeds", "bold yellow")


def alignments(measured: Sequence[Alignment], widths: Sequence[int], assumed: str) -> Iterator[RenderableType]:
    """How coherent each sum is, which assumption set that is, and where another one would take over."""
    from rich.table import Table
    from rich.text import Text

    for kind, meaning in SUMS.items():
        rows = [each for each in measured if each.kind == kind]
        if not rows:
            continue
        grid = Table(title=f"{kind}: {meaning}", title_justify="left", title_style="bold", header_style="bold")
        for heading in ("", "step", "slope (0 to", "coherent)", "ratio", "", "coherent from"):
            grid.add_column(heading, justify="left" if heading == "" else "right", no_wrap=True)
        for each in rows:
            slope = f"{each.slope.value:+.2f} ± {each.slope.error:.2f}"
            reached = each.verdict == "coherent" or each.crossover == inf
            crossover = "" if reached else f"n ≈ {each.crossover:.2g}"
            grid.add_row(
                each.name, str(each.step), slope, power(each.half), f"{each.ratio:.2f}", each.verdict, crossover
            )
        yield grid
    yield Text(f"\nat widths {widths[0]} to {widths[-1]}", "bold")
    for kind in SUMS:
        seen = Counter(each.verdict for each in measured if each.kind == kind)
        if seen:
            yield Text(f"  {kind}: " + ", ".join(f"{count} {verdict}" for verdict, count in seen.most_common()))
    obeyed = obeys(measured)
    yield Text(
        f"  so it obeys: {' or '.join(obeyed) or 'none of the assumption sets throughout'}; derived under: {assumed}"
    )
