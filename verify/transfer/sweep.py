"""A sweep: what is missing of a grid is run, and recorded as it finishes."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from widthwise.verify.transfer.config import Run, Sweep
from widthwise.verify.transfer.execute import FAILED, executor
from widthwise.verify.transfer.results import Results


def carry_out(sweep: Sweep, path: Path, how: str = "local", jobs: int = 1, console: Console | None = None) -> list[str]:
    """Run what the results file does not hold yet; Ctrl-C stops, and the same command goes on.

    Returns:
        What went wrong, by run; nothing where the grid is complete.

    Raises:
        DeriveError: when results cannot be read or written, or the executor is not there.
    """
    console = console or Console(highlight=False)
    results, execute = Results(path), executor(how)
    grid = list(sweep.runs())
    finished = results.load()
    missing = [run for run in grid if run.key not in finished]
    console.print(f"{sweep.name}: {len(grid)} runs, {len(grid) - len(missing)} of them finished before")
    failures = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("runs", total=len(grid), completed=len(grid) - len(missing))
        try:
            for run, outcome in execute(missing, jobs):
                if FAILED in outcome:
                    failures.append(f"{_name(run)}: {outcome[FAILED]}")
                    progress.console.print(f"failed: {failures[-1]}")
                    continue
                results.add(run, outcome)
                says = "diverged" if outcome["diverged"] is not None else f"{outcome['loss']:.4f}"
                progress.console.print(f"{_name(run)}: {says} ({outcome['seconds']:.0f} s)")
                progress.advance(task)
        except KeyboardInterrupt:
            failures.append("stopped; the same command goes on from here")
    return failures


def _name(run: Run) -> str:
    return f"{run.parametrization} width {run.width} lr {run.lr:.4g} seed {run.seed}"
