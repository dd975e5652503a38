"""Scale-free ops: RMSNorm, LayerNorm, L2Norm, BatchNorm. They tolerate relative changes of Θ(1), saturating beyond."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sympy import Expr

from widthwise.derive.errors import DeriveError
from widthwise.derive.exponents import HALF, ZERO, n_to, smallest
from widthwise.derive.facts import Fact
from widthwise.derive.graph import Node, Shape, extent, shape_text
from widthwise.derive.ops.registry import Op, Piece, always, register
from widthwise.derive.signal import Flip, Signal, Term

if TYPE_CHECKING:
    from widthwise.derive.backward import Backward
    from widthwise.derive.forward import Forward, State


def _shape(shapes: Sequence[Shape], attrs: Mapping[str, Any]) -> Shape:
    (x,) = shapes
    if not x or x[-1] != attrs["axis"]:
        raise DeriveError(
            f"a norm over {attrs['axis']} cannot take {shape_text(x)}", cure="it normalizes the last axis"
        )
    return x


def divisor(node: Node, size: Expr) -> Expr:
    """The exponent of what the norm divides by: the length for L2Norm, the rms for the others (for BatchNorm, that of
    each channel over tokens and places, which are width-free)."""
    return size + extent(node.attrs["axis"].dims) * HALF if node.op == "l2_norm" else size


def _centred(node: Node) -> Flip:
    """Taking the mean away along an axis makes the entries' signs cancel there, whatever left the mean."""
    return Flip(f"the mean taken away by {node.output}", frozenset(dim.name for dim in node.attrs["axis"].dims))


def _forward(walk: Forward, node: Node) -> State:
    from widthwise.derive.forward import Change, State

    (x,) = walk.inputs(node)
    by = -divisor(node, x.init.size)
    init = Signal(x.init.shifted(by).terms, 1.0)
    if node.op == "layer_norm":
        init = init.mapped(lambda term: Term(term.size, {**term.odd, _centred(node): 0.0}))
    fact = walk.fact(
        node,
        init,
        f"divided by its {'length' if node.op == 'l2_norm' else 'rms'}, {n_to(-by)}: "
        f"one and the same factor for all {'tokens' if node.op == 'batch_norm' else 'entries'}, so sign flips stay",
    )
    changes: tuple[Change, ...] = ()
    if x.change is not None:
        size = smallest((ZERO, x.change - x.init.size)) + init.size
        changes = (
            Change(
                size,
                False,
                Fact(
                    f"change of {node.output}", size, "relative to the input, and never more than the output", (x.fact,)
                ),
            ),
        )
    return State(init, fact, changes)


def _backward(walk: Backward, node: Node, gradient: Signal) -> list[Piece]:
    by = divisor(node, walk.states[node.inputs[0]].init.size)
    return [
        Piece(
            0, gradient.shifted(-by), f"divided by what the norm divides by, {n_to(by)}", frozenset(), (node.inputs[0],)
        )
    ]


register(Op("rms_norm", _shape, _forward, _backward, always("relative"), None, ("aten.rms_norm",), (0,)))
register(
    Op(
        "layer_norm",
        _shape,
        _forward,
        _backward,
        always("relative"),
        aten=("aten.layer_norm", "aten.native_layer_norm"),
        entrywise=(0,),
    )
)
register(
    Op(
        "batch_norm",
        lambda shapes, attrs: shapes[0],
        _forward,
        _backward,
        always("relative"),
        aten=("aten.batch_norm",),
        entrywise=(0,),
    )
)
register(
    Op("l2_norm", _shape, _forward, _backward, always("relative"), None, ("aten.linalg_vector_norm",), entrywise=(0,))
)
