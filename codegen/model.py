"""What the model template is filled with: the graph as modules, in the order in which they are called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from widthwise.derive import Graph, RuleTable
from widthwise.derive.errors import DeriveError


def context(graph: Graph, table: RuleTable) -> Mapping[str, Any]:
    """The template's variables."""
    raise DeriveError(f"no model of {graph.name} can be emitted yet", cure="emit the parametrization")
