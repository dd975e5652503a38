"""Products of two activations: entrywise, outer, matrix-vector; whatever axes the output lacks are summed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sympy import Expr

from widthwise.derive.errors import DeriveError
from widthwise.derive.exponents import HALF, largest
from widthwise.derive.facts import Fact
from widthwise.derive.graph import Dim, Node, Shape, atoms, extent, shape_text
from widthwise.derive.ops.registry import Op, Piece, always, register
from widthwise.derive.signal import Signal

if TYPE_CHECKING:
    from widthwise.derive.backward import Backward
    from widthwise.derive.forward import Forward, State


def _shape(shapes: Sequence[Shape], attrs: Mapping[str, Any]) -> Shape:
    target: Shape = attrs["shape"]
    known = set(atoms(shapes[0])) | set(atoms(shapes[1]))
    if missing := [dim.name for dim in atoms(target) if dim not in known]:
        raise DeriveError(
            f"a product of {shape_text(shapes[0])} and {shape_text(shapes[1])} has no axis {', '.join(missing)}",
            cure="an output axis must come from an input",
        )
    return target


def summed(a: Shape, b: Shape, out: Shape) -> tuple[Dim, ...]:
    """The axes of either factor that the output lacks."""
    kept = set(atoms(out))
    return tuple(dim for dim in dict.fromkeys(atoms(a) + atoms(b)) if dim not in kept)


def product_change(walk: Forward, a: State, b: State, over: tuple[Dim, ...]) -> Expr | None:
    """The size of the change of a product summed over ``over``, from the changes of its factors."""
    parts: list[Expr] = []
    for one, other in ((a, b), (b, a)):
        if one.change is not None:
            parts.append(one.change + other.trained)
    if not parts:
        return None
    aligned = walk.assume.activations_trained == "aligned"
    return largest(parts) + extent(over) * (1 if aligned else HALF)


def _forward(walk: Forward, node: Node) -> State:
    from widthwise.derive.forward import Change, State

    a, b = walk.inputs(node)
    shapes = walk.graph.shapes
    over = summed(shapes[node.inputs[0]], shapes[node.inputs[1]], node.shape)
    for name in node.inputs:
        if name in walk.graph.parameters and (axes := set(over) & set(atoms(shapes[name]))):
            raise DeriveError(
                f"a product sums the parameter {name!r} over {', '.join(sorted(axis.name for axis in axes))}",
                where=node.where,
                cure="use Builder.linear (op 'linear'), which knows the bounds of a weight",
            )
    init, because = walk.contract(node, a.init, b.init, over)
    text = f"{node.inputs[0]} times {node.inputs[1]}" + (f": {because}" if over else "")
    change = product_change(walk, a, b, over)
    branch = walk.assume.activations_trained
    changes = (
        ()
        if change is None
        else (
            Change(
                change,
                False,
                Fact(
                    f"change of {node.output}",
                    change,
                    f"Δ{node.inputs[0]} met with {node.inputs[1]} and the reverse, {branch}",
                    (a.fact, b.fact),
                    frozenset((f"Δactivation · activation: {branch}",)) if over else frozenset(),
                ),
            ),
        )
    )
    assumed = f"activation · activation at init: {walk.assume.activations}" if over else ""
    return State(init, walk.fact(node, init, text, assumed), changes)


def _backward(walk: Backward, node: Node, gradient: Signal) -> list[Piece]:
    pieces = []
    for slot, other in ((0, 1), (1, 0)):
        mine, theirs = node.inputs[slot], node.inputs[other]
        over = summed(node.shape, walk.graph.shapes[theirs], walk.graph.shapes[mine])
        signal, because = walk.contract(gradient, walk.trained(theirs), over)
        text = f"∂L/∂{node.output} times {theirs}" + (f": {because}" if over else "")
        assumed = frozenset((f"forward · backward: {walk.assume.forward_backward}",)) if over else frozenset()
        pieces.append(Piece(slot, signal, text, assumed, (theirs,)))
    return pieces


register(
    Op(
        "einsum",
        _shape,
        _forward,
        _backward,
        always("absolute"),
        aten=("aten.mul.Tensor", "aten.einsum", "aten.bmm"),
        entrywise=(0, 1),
    )
)
