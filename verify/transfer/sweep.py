"""Sweeps: what is missing of their grids is run, and recorded as it finishes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from widthwise.derive.errors import DeriveError
from widthwise.verify.transfer.config import Run, Sweep
from widthwise.verify.transfer.execute import FAILED, Executor, Outcome, executor
from widthwise.verify.transfer.extend import further, tuned_rates
from widthwise.verify.transfer.results import Results

STOPPED = "stopped; the same command goes on from here"


class Books:
    """A sweep beside its results: what was planned, what is finished."""

    def __init__(self, sweep: Sweep, path: Path) -> None:
        self.sweep, self.results = sweep, Results(path)
        self.finished: dict[str, dict[str, Any]] = {}
        self.stages: list[dict[str, Run]] = []
        self.read()

    def read(self) -> None:
        """What is finished by now, and what that leaves to plan."""
        self.finished = self.results.load()
        self.plan()

    @property
    def grid(self) -> dict[str, Run]:
        return {key: run for stage in self.stages for key, run in stage.items()}

    def left(self, *stages: int) -> dict[str, Run]:
        """What is not finished, of all stages or of some."""
        wanted = [self.stages[each] for each in stages if each < len(self.stages)] if stages else self.stages
        return {key: run for stage in wanted for key, run in stage.items() if key not in self.finished}

    def plan(self) -> None:
        """All grids that can be known by now; and where they are finished, what their results leave open."""
        planned = self.sweep.stages(tuned_rates(self.sweep, self.finished))
        self.stages = [{run.key: run for run in stage} for stage in planned]
        runs = list(self.grid.values())
        while not self.left():
            grid = self.grid
            own = [entry for key, entry in self.finished.items() if key in grid]
            more = {run.key: run for run in further(self.sweep, runs, own) if run.key not in grid}
            if not more:
                return
            self.stages.append(more)

    def rehearse(self) -> None:
        """Make a model of each parametrization that has runs left: what is wrong with all of them is said once.

        Raises:
            DeriveError: where that cannot be.
        """
        from widthwise.verify.transfer.train import skeleton

        for run in {run.parametrization: run for run in self.left().values()}.values():
            skeleton(run)

    def add(self, run: Run, outcome: Outcome) -> None:
        self.finished[run.key] = self.results.add(run, outcome)


def carry_out(
    sweeps: Sequence[tuple[Sweep, Path]], how: str = "local", jobs: int = 1, console: Console | None = None
) -> list[str]:
    """Run what the results file of each sweep does not hold yet; Ctrl-C stops, and the same command goes on.

    First comes the first stage of every sweep, then the second of every sweep, and so on. A run that two of the sweeps
    have in common is carried out once, and recorded in the files of both.

    Returns:
        What went wrong, by run; nothing where all grids are complete.

    Raises:
        DeriveError: when results cannot be read or written, or another sweep, or two of these, write them, the
            executor is not there, or a sweep's model cannot be made.
    """
    console = console or Console(highlight=False)
    execute = executor(how)
    _own_files(sweeps)
    books = [Books(sweep, path) for sweep, path in sweeps]
    failures: dict[str, str] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with ExitStack() as claims:
        for each in books:
            if each.left():
                claims.enter_context(each.results.claimed())
                each.read()  # another sweep may have written until now
        for each in books:
            runs = len(each.grid)
            console.print(f"{each.sweep.name}: {runs} runs, {runs - len(each.left())} of them finished before")
        for each in books:
            each.rehearse()
        with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
            try:
                while _round(books, execute, jobs, failures, progress):
                    for each in books:
                        each.plan()
            except KeyboardInterrupt:
                return [*failures.values(), STOPPED]
    return list(failures.values())


def _own_files(sweeps: Sequence[tuple[Sweep, Path]]) -> None:
    """Whether each sweep has a results file of its own."""
    names: dict[Path, str] = {}
    for sweep, path in sweeps:
        if (place := path.resolve()) in names:
            raise DeriveError(
                f"two of the sweeps, {names[place]!r} and {sweep.name!r}, would write to {path}",
                cure="give each a file name of its own",
            )
        names[place] = sweep.name


def _round(books: list[Books], execute: Executor, jobs: int, failures: dict[str, str], progress: Progress) -> bool:
    """Carry out all that is left and did not fail before; whether there was anything."""
    _share(books)
    stages = range(max(len(each.stages) for each in books))
    waiting = {key: run for stage in stages for each in books for key, run in each.left(stage).items()}
    for key in failures:
        waiting.pop(key, None)
    if not waiting:
        return False
    task = progress.add_task("runs", total=len(waiting))
    noted: set[str] = set()
    for number, (run, outcome) in enumerate(execute(list(waiting.values()), jobs), 1):
        progress.advance(task)
        if FAILED in outcome:
            failures[run.key] = f"{_name(run)}: {outcome[FAILED]}"
            says = "the same" if outcome[FAILED] in noted else outcome[FAILED]
            noted.add(outcome[FAILED])
            progress.console.print(f"failed: {_name(run)}: {says}", soft_wrap=True)
            continue
        for each in books:
            if run.key in each.grid:
                each.add(run, outcome)
        says = "diverged" if outcome["diverged"] is not None else f"{outcome['loss']:.4f}"
        line = f"{number}/{len(waiting)} {_name(run)}: {says} ({outcome['seconds']:.0f} s)"
        progress.console.print(line, soft_wrap=True)
        if (note := outcome.get("note")) and note not in noted:
            progress.console.print(f"note: {note}", soft_wrap=True)
            noted.add(note)
    return True


def _share(books: list[Books]) -> None:
    """Record in each sweep's file what another's holds already."""
    for each in books:
        for key, run in each.left().items():
            for other in books:
                if key in other.finished:
                    each.finished[key] = each.results.add(run, other.finished[key])
                    break


def _name(run: Run) -> str:
    return f"{run.request.optimizer} {run.parametrization} width {run.width} lr {run.lr:.4g} seed {run.seed}"
