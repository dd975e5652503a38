"""Transfer as a table and as a picture."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from widthwise.derive.errors import DeriveError
from widthwise.verify.transfer.metrics import Curve, Transfer, curves, transfers

HEADINGS = (
    "parametrization",
    "width",
    "best lr",
    "loss there",
    "shift, octaves",
    "flat, octaves",
    "regret, nats",
    "one octave off",
)


def rows(entries: Iterable[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The table's cells. An optimum at an edge of the grid is marked, since it may lie beyond."""
    entries = list(entries)
    found = {(each.parametrization, each.width): _row(each) for each in transfers(entries)}
    for curve in curves(entries):
        nothing = curve.parametrization, str(curve.width), "·", "all diverged", "·", "·", "·", "·"
        found.setdefault((curve.parametrization, curve.width), nothing)
    return [found[key] for key in sorted(found)]


def _row(each: Transfer) -> tuple[str, ...]:
    edge = " (edge)" if each.at_edge else ""
    return (
        each.parametrization,
        str(each.width),
        f"{each.best_lr:.4g}{edge}",
        f"{each.best_loss:.4f}",
        "·" if math.isnan(each.shift) else f"{each.shift:+.2f}{_error(each.shift_error, 2)}",
        " to ".join(f"{end:+.2f}" if math.isfinite(end) else "·" for end in each.flat),
        _regret(each),
        "·" if math.isnan(each.sensitivity) else f"{each.sensitivity:.4f}",
    )


def _regret(each: Transfer) -> str:
    if math.isinf(each.regret):
        return "diverged"
    if math.isnan(each.regret) or (each.beyond and each.regret == 0):
        return "·"
    return f"{'> ' if each.beyond else ''}{each.regret:.4f}{_error(each.regret_error, 4)}"


def _error(value: float, digits: int) -> str:
    return f" ± {value:.{digits}f}" if value > 0 else ""


def table(entries: Iterable[Mapping[str, Any]]) -> Table:
    """For the terminal."""
    made = Table()
    for index, heading in enumerate(HEADINGS):
        first = index == 0
        made.add_column(heading, justify="left" if first else "right", no_wrap=first, overflow="fold")
    for row in rows(entries):
        made.add_row(*row)
    return made


def markdown(entries: Iterable[Mapping[str, Any]]) -> str:
    """For a page."""
    lines = [" | ".join(HEADINGS), " | ".join(["---"] + ["---:"] * (len(HEADINGS) - 1))]
    lines += [" | ".join(row) for row in rows(entries)]
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def plot(entries: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Loss against log2 of the learning rate: a panel a parametrization, a line a width, lowest points marked.

    Raises:
        DeriveError: without matplotlib, when the file cannot be written, or where there is nothing to plot.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise DeriveError("plots need matplotlib", cure="pip install 'widthwise[plot]'") from None
    finite = [curve for curve in curves(entries) if math.isfinite(min(curve.losses))]
    if not finite:
        raise DeriveError("there is no run to plot that did not diverge", cure="try smaller learning rates")
    families: dict[str, list[Curve]] = {}
    for curve in finite:
        families.setdefault(curve.parametrization, []).append(curve)
    figure = Figure(figsize=(4.4 * len(families), 3.6), layout="constrained")
    axes = figure.subplots(1, len(families), sharey=True, squeeze=False)[0]
    ends = [curve.losses[curve.best] for curve in finite]
    highest = max(loss for curve in finite for loss in curve.losses if math.isfinite(loss))
    for axis, (name, family) in zip(axes, families.items(), strict=True):
        for shade, curve in enumerate(family):
            color = (0.1, 0.2 + 0.6 * shade / max(1, len(family) - 1), 0.9 - 0.7 * shade / max(1, len(family) - 1))
            kept = [
                (math.log2(lr), loss, error)
                for lr, loss, error in zip(curve.lrs, curve.losses, curve.errors, strict=True)
                if math.isfinite(loss)
            ]
            x, y, error = zip(*kept, strict=True)
            bars = [0 if math.isnan(each) else each for each in error]
            axis.errorbar(x, y, bars, color=color, marker=".", markersize=4, label=curve.width)
            axis.plot(math.log2(curve.lrs[curve.best]), curve.losses[curve.best], "o", color=color)
        axis.set(title=name, xlabel="log2 learning rate at the base width")
        axis.set_ylim(min(ends) - 0.03, min(max(ends) + 0.5, highest + 0.03))
        axis.legend(title="width")
    axes[0].set_ylabel("loss, nats a token")
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise DeriveError(
            f"cannot write {path}: {error.strerror}", cure="give a file in a folder that exists"
        ) from None
    except ValueError as error:  # of a kind of picture that there is not
        raise DeriveError(f"cannot write {path}: {error}", cure="give a file name that ends in .png") from None
