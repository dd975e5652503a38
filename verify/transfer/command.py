"""``widthwise train``: one run, by one process or by a team."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from widthwise.derive.errors import DeriveError, unknown_name
from widthwise.verify.transfer.config import read_sweep
from widthwise.verify.transfer.results import Results
from widthwise.verify.transfer.team import joined
from widthwise.verify.transfer.train import train


def train_one(
    file: Path, parametrization: str, width: int | None, lr: float, seed: int, strategy: str, output: Path | None
) -> None:
    """Carry out one run of a sweep's file, at a width and a learning rate that need not be in its grid.

    Raises:
        DeriveError: for a file, parametrization, width, learning rate or strategy that will not do, or an output that a
            sweep or another run writes to.
    """
    sweep = read_sweep(file)
    if parametrization not in sweep.parametrizations:
        raise unknown_name("parametrization", parametrization, list(sweep.parametrizations))
    if lr <= 0 or (width is not None and width < 1):
        raise DeriveError("learning rate and width must be positive", cure="correct them")
    run = sweep.run(parametrization, width or max(sweep.widths), lr, seed)
    with joined(strategy) as team, ExitStack() as claim:
        if output is not None and not team.rank:
            claim.enter_context(Results(output).claimed())  # before hours of training, not after
        outcome = train(run, team)
        if team.rank:
            return
        if output is not None:
            Results(output).add(run, outcome)
        says = f"diverged at step {outcome['diverged']}" if outcome["loss"] is None else f"{outcome['loss']:.4f} nats"
        speed = run.training.batch * run.training.length / outcome["step_seconds"]
        Console(highlight=False).print(
            f"{run.parametrization}, width {run.width}, {outcome['parameters'] / 1e6:.1f} M parameters, lr {lr:.4g}: "
            f"{says} a token held out; {speed:,.0f} tokens a second, {outcome['seconds']:.0f} s"
        )
