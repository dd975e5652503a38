"""``widthwise trace``: from a model's function to a file that ``derive`` and ``generate`` take."""

from __future__ import annotations

from collections.abc import Sequence

from widthwise.derive.graph_toml import write_graph
from widthwise.verify.trace import trace
from widthwise.verify.trace.export import imported


def traced_text(target: str, widths: Sequence[int], name: str) -> tuple[str, tuple[str, ...]]:
    """The file's text, and warnings.

    Raises:
        DeriveError: when the model cannot be traced.
    """
    traced = trace(imported(target), widths, name or target.partition(":")[2])
    command = f"widthwise trace {target} --widths {' '.join(map(str, widths))}"
    return write_graph(traced.graph, (command, *traced.warnings)), traced.warnings
