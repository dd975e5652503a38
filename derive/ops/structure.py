"""Ops without a weight or a nonlinearity: input, add, residual, scale, reshape, and the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sympy import Expr

from widthwise.derive.errors import DeriveError
from widthwise.derive.exponents import ZERO, n_to
from widthwise.derive.facts import Fact
from widthwise.derive.graph import Node, Shape, atoms, shape_text
from widthwise.derive.ops.registry import Op, Piece, always, register
from widthwise.derive.signal import Signal, added, signal
from widthwise.derive.solve import MULTIPLIER

if TYPE_CHECKING:
    from widthwise.derive.backward import Backward
    from widthwise.derive.forward import Forward, State


# -- input: data, Θ(1) by its own nature ------------------------------------------------------------------------


def _input_forward(walk: Forward, node: Node) -> State:
    from widthwise.derive.forward import State

    return State(signal(ZERO), Fact(node.output, ZERO, "data: Θ(1) entries"))


register(
    Op(
        "input",
        lambda shapes, attrs: attrs["shape"],
        _input_forward,
        lambda walk, node, gradient: [],
        always("passes"),
        aten=("placeholder",),
    )
)


# -- add and residual --------------------------------------------------------------------------------------------


def _add_shape(shapes: Sequence[Shape], attrs: Mapping[str, Any]) -> Shape:
    if any(atoms(shape) != atoms(shapes[0]) for shape in shapes[1:]):
        raise DeriveError(
            f"cannot add {' and '.join(map(shape_text, shapes))}", cure="both must have the same axes in the same order"
        )
    return shapes[0]


def _add_forward(walk: Forward, node: Node) -> State:
    from widthwise.derive.forward import State

    states = walk.inputs(node)
    felt = [name for name in node.inputs if not walk.starts_at_zero(name, node)] or node.inputs
    init = added(walk.states[name].init for name in felt)
    distinct = {(change.size, change.own): change for state in states for change in state.changes}
    changes = tuple(distinct.values())
    return State(
        init,
        walk.fact(node, init, f"the larger of {' and '.join(felt)}" if len(felt) > 1 else f"that of {felt[0]}"),
        changes,
    )


def _add_backward(walk: Backward, node: Node, gradient: Signal) -> list[Piece]:
    return [Piece(slot, gradient, f"∂L/∂{node.output} passes through the sum") for slot in range(len(node.inputs))]


register(Op("add", _add_shape, _add_forward, _add_backward, always("passes"), aten=("aten.add",)))
# A residual stream keeps a scale of its own, Θ(1), from layer to layer; a plain sum does not.
register(Op("residual", _add_shape, _add_forward, _add_backward, always("absolute")))


# -- scale: an explicit factor n^power, fixed by the architecture or carried by a multiplier ---------------------


def factor(walk: Forward | Backward, node: Node) -> Expr:
    """The exponent of a scale node: its fixed power plus the multiplier it carries, if it does."""
    carrier = node.attrs.get("carrier")
    power: Expr = node.attrs["power"]
    return power + walk.knobs.unknown(MULTIPLIER, carrier, node.where) if carrier else power


def _scale_forward(walk: Forward, node: Node) -> State:
    from widthwise.derive.forward import State

    (x,) = walk.inputs(node)
    by = factor(walk, node)
    init = x.init.shifted(by)
    changes = tuple(
        change._replace(
            size=change.size + by, fact=Fact(f"change of {node.output}", change.size + by, "scaled", (change.fact,))
        )
        for change in x.changes
    )
    carrier = node.attrs.get("carrier")
    because = f"scaled by {'the multiplier ' + carrier if carrier else n_to(by)}"
    return State(init, walk.fact(node, init, because), changes)


def _scale_backward(walk: Backward, node: Node, gradient: Signal) -> list[Piece]:
    by = walk.knobs.value(factor(walk, node))
    return [Piece(0, gradient.shifted(by), f"scaled by {n_to(by)}")]


register(
    Op(
        "scale",
        lambda shapes, attrs: shapes[0],
        _scale_forward,
        _scale_backward,
        always("passes"),
        aten=("aten.mul.Scalar", "aten.div.Scalar"),
        entrywise=(0,),
    )
)


# -- reshape: split or merge axes, never reorder them -------------------------------------------------------------


def _reshape_shape(shapes: Sequence[Shape], attrs: Mapping[str, Any]) -> Shape:
    target: Shape = attrs["shape"]
    if atoms(target) != atoms(shapes[0]):
        raise DeriveError(
            f"cannot view {shape_text(shapes[0])} as {shape_text(target)}",
            cure="a reshape groups the same axes in the same order",
        )
    return target


def _reshape_forward(walk: Forward, node: Node) -> State:
    from widthwise.derive.forward import State

    (x,) = walk.inputs(node)
    return State(x.init, walk.fact(node, x.init, f"{node.inputs[0]} with its axes regrouped"), x.changes)


register(
    Op(
        "reshape",
        _reshape_shape,
        _reshape_forward,
        lambda walk, node, gradient: [Piece(0, gradient, "axes regrouped")],
        always("passes"),
        aten=("aten.view", "aten.reshape", "aten._unsafe_view"),
        entrywise=(0,),
    )
)


# -- broadcast: every entry once for each index of further axes, such as places of a feature map --------------------


def _broadcast_shape(shapes: Sequence[Shape], attrs: Mapping[str, Any]) -> Shape:
    target: Shape = attrs["shape"]
    mine = atoms(shapes[0])
    if tuple(dim for dim in atoms(target) if dim in mine) != mine:
        raise DeriveError(
            f"cannot broadcast {shape_text(shapes[0])} to {shape_text(target)}",
            cure="its own axes must be among the new ones, in their order",
        )
    return target


def _broadcast_forward(walk: Forward, node: Node) -> State:
    from widthwise.derive.forward import State

    (x,) = walk.inputs(node)
    return State(x.init, walk.fact(node, x.init, f"{node.inputs[0]}, the same along further axes"), x.changes)


def _broadcast_backward(walk: Backward, node: Node, gradient: Signal) -> list[Piece]:
    mine = atoms(walk.graph.shapes[node.inputs[0]])
    shared = tuple(dim for dim in atoms(node.shape) if dim not in mine)
    total, because = walk.contract(gradient, signal(ZERO), shared)
    return [Piece(0, total, f"∂L/∂{node.output} summed over the further axes: {because}")]


register(
    Op(
        "broadcast",
        _broadcast_shape,
        _broadcast_forward,
        _broadcast_backward,
        always("passes"),
        aten=("aten.expand",),
        entrywise=(0,),
    )
)


# -- cross-entropy: where the backward walk starts -----------------------------------------------------------------


def _loss_forward(walk: Forward, node: Node) -> State:
    from widthwise.derive.forward import State

    return State(signal(ZERO), walk.fact(node, signal(ZERO), "a mean over tokens of Θ(1) logits' cross-entropy"))


def _loss_backward(walk: Backward, node: Node, gradient: Signal) -> list[Piece]:
    return [Piece(0, signal(ZERO), "softmax minus target: Θ(1) entries")]


register(
    Op(
        "cross_entropy",
        lambda shapes, attrs: (),
        _loss_forward,
        _loss_backward,
        always("absolute"),
        aten=("aten.cross_entropy_loss",),
    )
)
