"""``widthwise coord-check``: from what was asked on the command line to a report on screen and in files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from widthwise.codegen.request import Request
from widthwise.derive import Graph, RuleTable, derive
from widthwise.derive.errors import DeriveError
from widthwise.derive.exponents import ZERO
from widthwise.derive.render import title
from widthwise.verify.coord import files, show
from widthwise.verify.coord.alignment import align
from widthwise.verify.coord.check import Report, check_widths, coordinate_check
from widthwise.verify.coord.described import Described
from widthwise.verify.coord.emitted import Emitted
from widthwise.verify.coord.factory import Factory, described_by
from widthwise.verify.coord.predict import follows_gradient, predictions
from widthwise.verify.coord.subject import Subject

SEEDS, STEPS = 10, 2
THOROUGH_SEEDS, THOROUGH_STEPS = 40, 4


@dataclass(frozen=True)
class Asked:
    """The options of the command that are not those of a derivation."""

    widths: tuple[int, ...]
    rules: Path | None = None
    description: str | None = None
    base_width: int | None = None
    lr: float | None = None
    seeds: int | None = None
    steps: int | None = None
    first_seed: int = 0
    thorough: bool = False
    strict: bool = False
    alignment: bool = False
    graph: bool = False
    output: Path = Path()
    plot: bool = True


def command(request: Request, asked: Asked) -> int:
    """Check, show, write ``coord_check.json`` and ``coord_check.png``; the exit code: 0, it passed; 1, it did not.

    Raises:
        DeriveError: for anything that cannot be checked as asked.
    """
    widths = check_widths(asked.widths)
    torch.set_num_threads(1)  # tensors are small, and a thread that waits for another on a busy machine waits long
    base = asked.base_width or widths[0]
    steps = asked.steps or (THOROUGH_STEPS if asked.thorough else STEPS)
    seeds = asked.seeds or (THOROUGH_SEEDS if asked.thorough else SEEDS)
    if seeds < 2:
        raise DeriveError("one seed has no standard error", cure="give --seeds 2 or more")
    subject, reference, graph, table = _subject(request, asked, base)
    predicted = predictions(graph, table)
    console = Console(highlight=False, width=None if Console().is_terminal else 120)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), transient=True,
        console=Console(stderr=True),
    )  # fmt: skip
    if asked.alignment:
        return _alignment(subject, table, widths, _numbers(asked, seeds), steps, console, bar)
    with bar:
        task = bar.add_task("models", total=(seeds + (2 if reference else 0)) * len(widths))
        report = coordinate_check(
            subject,
            predicted,
            widths,
            title=f"{title(table)} · {_what(subject)}",
            rules=table.hash,
            seeds=_numbers(asked, seeds),
            steps=steps,
            follows_gradient=follows_gradient(table.optimizer),
            reference=reference,
            progress=lambda: bar.advance(task),
        )
    console.print(report.title, style="bold")
    for part in show.terminal(report):
        console.print(part)
    _write(report, asked, console)
    if report.interrupted:
        return 130
    return 0 if report.passed and not (asked.strict and report.counts["unresolved"]) else 1


def _alignment(
    subject: Subject,
    table: RuleTable,
    widths: Sequence[int],
    seeds: Sequence[int],
    steps: int,
    console: Console,
    bar: Progress,
) -> int:
    if not isinstance(subject, Described):
        raise DeriveError("--alignment needs every tensor of a description", cure="give an architecture, not a factory")
    plainly = Described(subject.graph, subject.table, subject.base, lr=subject.lr, device=subject.device)
    with bar:
        task = bar.add_task("models", total=len(seeds) * len(widths))
        at = sorted({0, 1, steps})
        measured, _ = align(plainly, widths, seeds, at, progress=lambda: bar.advance(task))
    console.print(title(table), style="bold")
    for part in show.alignments(measured, widths, f"{table.assumptions[0].split(':')[0]}, {table.regime}"):
        console.print(part)
    return 0


def _numbers(asked: Asked, seeds: int) -> Sequence[int]:
    return range(asked.first_seed, asked.first_seed + seeds)


def _what(subject: Subject) -> str:
    if isinstance(subject, Emitted):
        return "the generated model"
    return "the description itself" if isinstance(subject, Described) else "a factory of yours"


def _subject(request: Request, asked: Asked, base: int) -> tuple[Subject, Subject | None, Graph, RuleTable]:
    """What is checked, what is shown beside it, and what it is held against."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if asked.rules is not None:
        graph, table = described_by(asked.rules, asked.description)
        return Factory.imported(request.architecture, graph, table, base, asked.lr, device), None, graph, table
    graph = request.graph()
    table = request.table(graph)
    plain = Described(graph, standard(graph, table), base, lr=asked.lr, device=device)
    reference = plain if asked.plot else None
    if not asked.graph:
        emitted = Emitted(graph, table, base, lr=asked.lr, device=device, request=request)
        try:
            emitted.prepare()
        except DeriveError as error:
            Console(stderr=True).print(
                f"no model of it is generated ({error.what}): its description is run", style="dim"
            )
        else:
            return emitted, reference, graph, table
    return Described(graph, table, base, lr=asked.lr, device=device), reference, graph, table


def standard(graph: Graph, table: RuleTable) -> RuleTable:
    """The same model in standard parametrization: fan-in init, no multipliers, one learning rate."""
    rules = derive(graph, table.optimizer, parametrization="standard").rules
    kept = {"lr": ZERO, "eps": ZERO}
    return replace(
        table,
        rules=tuple(
            replace(
                rule,
                multiplier=None if rule.multiplier is None else ZERO,
                **{knob: value for knob, value in kept.items() if getattr(rule, knob) is not None},
            )
            for rule in rules
        ),
    )


def _write(report: Report, asked: Asked, console: Console) -> None:
    asked.output.mkdir(parents=True, exist_ok=True)
    data, picture = asked.output / "coord_check.json", asked.output / "coord_check.png"
    files.write_json(report, data)
    written = [str(data)]
    if asked.plot:
        if files.write_plot(report, picture):
            written.append(str(picture))
        else:
            console.print("no plot without matplotlib: pip install 'widthwise[plot]'", style="dim")
    console.print(f"\nwritten: {', '.join(written)}", style="dim")
