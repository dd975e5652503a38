"""A report as files: JSON, and a plot where matplotlib is installed. Either is there whole or not at all."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from widthwise.derive.errors import DeriveError
from widthwise.verify.coord.check import Curves, Report


def write_json(report: Report, path: Path) -> None:
    """The whole report; numbers that are none become null.

    Raises:
        DeriveError: when the file cannot be written.
    """
    text = json.dumps(rounded(report.as_dict()), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    _atomically(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def write_plot(report: Report, path: Path) -> bool:
    """One panel a step, a line a tensor: sizes over those at the smallest width; the standard parametrization in a
    second row where it was run. False, and no file, without matplotlib (``pip install 'widthwise[plot]'``).

    Raises:
        DeriveError: when the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    rows = [("these rules", report.curves)] + ([("standard", report.reference)] if report.reference else [])
    figure = Figure(figsize=(4.2 * (report.steps + 1), 3.4 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), report.steps + 1, squeeze=False, sharey=True)
    for row, (title, curves) in zip(axes, rows, strict=True):
        for step, panel in enumerate(row):
            _panel(panel, report.widths, curves, step)
            what = "at initialization" if step == 0 else f"change after {step} step{'s' * (step > 1)}"
            panel.set_title(f"{title}: {what}", fontsize=9)
        row[0].set_ylabel("rms over that at the smallest width", fontsize=8)
    labels, names = axes[0][0].get_legend_handles_labels()
    figure.legend(labels, names, loc="outside right upper", fontsize=6, ncols=1 + len(names) // 40)
    figure.suptitle(report.title, fontsize=10)
    _atomically(path, lambda beside: figure.savefig(beside, dpi=130, format="png"))
    return True


def _panel(panel: Any, widths: Sequence[int], curves: Curves, step: int) -> None:
    for index, (name, steps) in enumerate(curves.items()):
        sizes = steps[step]
        style = ("-", "--", ":", "-.")[index // 10 % 4]
        panel.plot(widths, [size / sizes[0] for size in sizes], style, color=f"C{index % 10}", label=name, linewidth=1)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log", base=2)
    panel.set_xticks(widths, [str(width) for width in widths])
    panel.tick_params(labelsize=7)
    panel.grid(alpha=0.2)


def rounded(value: Any, digits: int = 6) -> Any:
    """Plain values for JSON, with so many digits, and null for what is no number."""
    if isinstance(value, dict):
        return {key: rounded(each, digits) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(each, digits) for each in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return value


def _atomically(path: Path, write: Callable[[Path], object]) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(beside)
        os.replace(beside, path)
    except OSError as error:
        raise DeriveError(
            f"cannot write {path}: {error.strerror}", cure="give a folder that exists (--output)"
        ) from None
    finally:
        beside.unlink(missing_ok=True)
