"""Dense convolution: y[c] = Σ over input channels and taps, a linear map at every place of a signal or an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sympy import Expr

from widthwise.derive.errors import DeriveError
from widthwise.derive.facts import Fact
from widthwise.derive.graph import Dim, Node, Shape, atoms, extent, shape_text
from widthwise.derive.ops.registry import Op, Piece, Tolerance, register
from widthwise.derive.ops.weights import operator_norm
from widthwise.derive.signal import Signal, through

if TYPE_CHECKING:
    from widthwise.derive.backward import Backward
    from widthwise.derive.forward import Forward, State
    from widthwise.derive.optimizers import Step

_ROWS, _COLUMNS = frozenset((0,)), frozenset((1,))


def _shape(shapes: Sequence[Shape], attrs: Mapping[str, Any]) -> Shape:
    x, weight = shapes
    if len(weight) < 2 or x[:1] != weight[1:2]:
        raise DeriveError(
            f"a convolution of {shape_text(weight)} cannot take {shape_text(x)}",
            cure="its first axis must be the input channels, and the weight [out, in, taps…]",
        )
    return (weight[0], *x[1:])


def _fans(walk: Forward | Backward, node: Node) -> tuple[tuple[Dim, ...], tuple[Dim, ...]]:
    weight = walk.graph.shapes[node.inputs[1]]
    return atoms(weight[1:]), atoms(weight[:1])


def _forward(walk: Forward, node: Node) -> State:
    from widthwise.derive.forward import Change, State

    x, weight = walk.inputs(node)
    role = node.inputs[1]
    fan_in, fan_out = _fans(walk, node)
    outcome = through(x.init, weight.init, fan_in, _ROWS)
    init = outcome.signal.shifted(walk.multiplier(node, role))
    fact = walk.fact(node, init, f"{role} * {node.inputs[0]}: {outcome.because}")
    changes = walk.own_step(node, role)
    if x.change is not None:
        gain = operator_norm(extent(fan_in), extent(fan_out))
        if walk.assume.upstream != "operator-norm":
            gain = extent(fan_in) / 2
        size = walk.multiplier(node, role) + weight.init.size + gain + x.change
        because = f"W₀·Δx: {walk.assume.upstream} over {', '.join(map(str, fan_in))}"
        assumed = frozenset((f"W₀·Δx: {walk.assume.upstream}",))
        upstream = Fact(f"change of {node.output} from upstream", size, because, (x.fact, weight.fact), assumed)
        changes += (Change(size, False, upstream),)
    return State(init, fact, changes)


def _backward(walk: Backward, node: Node, gradient: Signal) -> list[Piece]:
    weight = walk.inputs(node)[1]
    source, role = node.inputs
    fan_in, fan_out = _fans(walk, node)
    multiplier = walk.multiplier(node, role)
    back = through(gradient, weight.init, fan_out, _COLUMNS)
    signal = back.signal
    if walk.assume.backward_weight == "operator-norm":
        bound = gradient.size + weight.init.size + operator_norm(extent(fan_out), extent(fan_in))
        signal = signal.mapped(lambda term: type(term)(bound, term.odd))
    shared = atoms(walk.graph.shapes[source][1:])
    outer, how = walk.contract(gradient, walk.trained(source), shared)
    return [
        Piece(
            0,
            signal.shifted(multiplier),
            f"{role} transposed * ∂L/∂{node.output}: {back.because}",
            frozenset((f"W₀ᵀ·g: {walk.assume.backward_weight}",)),
            (role,),
        ),
        Piece(
            1,
            outer.shifted(multiplier),
            f"∂L/∂{node.output} with {source} at every place" + (f": {how}" if shared else ""),
            frozenset(),
            (source,),
        ),
    ]


def _tolerance(slot: int) -> Tolerance:
    return "weight" if slot == 1 else "absolute"


def _effect(walk: Forward, node: Node, step: Step) -> Expr:
    source, role = node.inputs
    fan_in, fan_out = _fans(walk, node)
    aligned = walk.assume.own_step == "aligned"
    gain = step.gain(extent(fan_in), extent(fan_out), aligned)
    return walk.multiplier(node, role) + walk.states[source].trained + gain


register(
    Op(
        "convolution",
        _shape,
        _forward,
        _backward,
        _tolerance,
        _effect,
        ("aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.convolution"),
    )
)
