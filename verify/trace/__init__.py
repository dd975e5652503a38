"""From a model that exists to a graph of the engine: ``trace(make_model, widths=(128, 160, 224))``.

torch.export at each width on the meta device; the calls aligned; casts and dead code removed; norms and repeated layers
recognized; the axes of every tensor learned; each call that is left written as a node, by a rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from widthwise.derive.errors import DeriveError
from widthwise.derive.graph import Graph
from widthwise.verify.trace import contractions, einsum, entrywise, known, mixing, movement
from widthwise.verify.trace.export import MakeModel, exported
from widthwise.verify.trace.lower import lowered
from widthwise.verify.trace.standins import expert_linear, mix, rotate, scan, stand_in

__all__ = ["Traced", "expert_linear", "mix", "rotate", "scan", "stand_in", "trace"]
_RULES_OF = (contractions, einsum, entrywise, known, mixing, movement)  # importing them registers


@dataclass(frozen=True)
class Traced:
    """A traced graph, and what had to be rounded on the way."""

    graph: Graph
    warnings: tuple[str, ...]


def trace(make: MakeModel, widths: Sequence[int] = (128, 160, 224), name: str = "traced") -> Traced:
    """The graph of the model that ``make(width)`` returns beside example inputs: (module, inputs).

    The model's output is taken as logits, with a cross-entropy behind it, unless it computes one itself.

    Raises:
        DeriveError: for anything without a rule, naming the call, its module and its line.
    """
    if not name.isidentifier():
        raise DeriveError(f"{name!r} is no name", cure="use letters, digits and _")
    sites, module = exported(make, tuple(widths))
    every = [each for each, _ in module.named_parameters(remove_duplicate=False)]
    graph, warnings = lowered(sites, every, tuple(widths), name, type(module).__name__)
    return Traced(graph, tuple(warnings))
