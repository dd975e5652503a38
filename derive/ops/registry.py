"""The op registry: shape, forward, backward, tolerance, effect of an own step and ATen names, together per op."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from sympy import Expr

from widthwise.derive.errors import DeriveError
from widthwise.derive.graph import Node, Shape
from widthwise.derive.signal import Signal

if TYPE_CHECKING:
    from widthwise.derive.backward import Backward
    from widthwise.derive.forward import Forward, State
    from widthwise.derive.optimizers import Step

Tolerance = Literal["absolute", "relative", "passes", "weight"]
"""What an input may change by: Θ(1); Θ(its own size); whatever the output may; or it is a weight, which has no
size of its own to keep."""


@dataclass(frozen=True)
class Piece:
    """A gradient for one input slot, with the reason for its size."""

    slot: int
    signal: Signal
    because: str
    assumed: frozenset[str] = frozenset()
    reads: tuple[str, ...] = ()


@dataclass(frozen=True)
class Op:
    """Everything the engine knows of one op.

    Attributes:
        shape: shapes of the inputs and attributes → shape of the output; raises DeriveError (without a place).
        forward: the output's state from the walk and the node.
        backward: the pieces of gradient for the inputs from the output's gradient.
        tolerance: what each input slot tolerates (see Tolerance).
        effect: for a weight slot, the size of the change its own step makes in the output, learning rate aside.
        aten: names of the ATen operators that mean this op, for tracing.
        entrywise: slots whose entries the output's are products of, one by one: channels pass through them.
    """

    name: str
    shape: Callable[[Sequence[Shape], Mapping[str, Any]], Shape]
    forward: Callable[[Forward, Node], State]
    backward: Callable[[Backward, Node, Signal], list[Piece]]
    tolerance: Callable[[int], Tolerance]
    effect: Callable[[Forward, Node, Step], Expr] | None = None
    aten: tuple[str, ...] = ()
    entrywise: tuple[int, ...] = ()


OPS: dict[str, Op] = {}


def register(op: Op) -> Op:
    """Add an op; a name can be taken once."""
    if op.name in OPS:
        raise ValueError(f"op {op.name!r} is already registered")
    OPS[op.name] = op
    return op


def lookup(node: Node) -> Op:
    """The op of a node.

    Raises:
        DeriveError: when no rule is registered under that name.
    """
    if node.op not in OPS:
        raise DeriveError(
            f"no rule for op {node.op!r}, which makes {node.output!r}",
            where=node.where,
            cure=f"register one in widthwise.derive.ops (known: {', '.join(sorted(OPS))})",
        )
    return OPS[node.op]


def always(tolerance: Tolerance) -> Callable[[int], Tolerance]:
    return lambda slot: tolerance
