"""Ops with a weight: linear map, depthwise short convolution, embedding look-up. They own a step and a bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sympy import Expr

from widthwise.derive.errors import DeriveError
from widthwise.derive.exponents import HALF, ZERO, largest, n_to
from widthwise.derive.facts import Fact
from widthwise.derive.graph import Dim, Node, Shape, atoms, extent, shape_text
from widthwise.derive.ops.registry import Op, Piece, Tolerance, register
from widthwise.derive.signal import Signal, contract, through

if TYPE_CHECKING:
    from widthwise.derive.backward import Backward
    from widthwise.derive.forward import Forward, State
    from widthwise.derive.optimizers import Step


def operator_norm(fan_in: Expr, fan_out: Expr) -> Expr:
    """Entry size of W·x over that of W and x, at most, for a random W: ‖W‖ = std·(√in + √out), ‖x‖ = |x|·√in."""
    return (largest((fan_in, fan_out)) + fan_in - fan_out) * HALF


def _weight_tolerance(slot: int) -> Tolerance:
    return "weight" if slot == 1 else "absolute"


# -- linear: y = multiplier · W x, contracting the last group of x with the last group of W -----------------------


def _linear_shape(shapes: Sequence[Shape], attrs: Mapping[str, Any]) -> Shape:
    x, weight = shapes
    if attrs.get("experts"):  # [experts, out, in], of which each token meets a width-free number
        if any(dim.exponent != ZERO for dim in weight[0].dims):
            raise DeriveError(
                f"the number of experts {weight[0]} grows with the width", cure="keep the number of experts fixed"
            )
        weight = weight[1:]
    if not x or x[-1] != weight[-1]:
        raise DeriveError(
            f"a linear map over {weight[-1]} cannot take an input of shape {shape_text(x)}",
            cure=f"its last axis must be {weight[-1]}",
        )
    return x[:-1] + weight[:-1]


def _fans(walk: Forward | Backward, node: Node) -> tuple[tuple[Dim, ...], tuple[Dim, ...]]:
    weight = walk.graph.shapes[node.inputs[1]]
    return atoms(weight[-1:]), atoms(weight[:-1])


def _rows(walk: Forward | Backward, role: str) -> frozenset[int]:
    return frozenset(range(len(walk.graph.shapes[role]) - 1))


def _linear_forward(walk: Forward, node: Node) -> State:
    from widthwise.derive.forward import Change, State

    x, weight = walk.inputs(node)
    role = node.inputs[1]
    fan_in, fan_out = _fans(walk, node)
    multiplier = walk.multiplier(node, role)
    outcome = through(x.init, weight.init, fan_in, _rows(walk, role))
    init = outcome.signal.shifted(multiplier)
    fact = walk.fact(node, init, f"{role} · {node.inputs[0]}: {outcome.because}")
    changes = walk.own_step(node, role)
    if x.change is not None:
        branch = walk.assume.upstream_readout if node.attrs.get("carrier") else walk.assume.upstream
        gain = operator_norm(extent(fan_in), extent(fan_out)) if branch == "operator-norm" else extent(fan_in) * HALF
        size = multiplier + weight.init.size + gain + x.change
        reason = (
            f"W₀·Δx: ‖{role}‖ lets a change of {node.inputs[0]} through with {n_to(gain)}"
            if branch == "operator-norm"
            else f"W₀·Δx taken as incoherent over {', '.join(map(str, fan_in))}"
        )
        changes += (
            Change(
                size,
                False,
                Fact(
                    f"change of {node.output} from upstream",
                    size,
                    reason,
                    (x.fact, weight.fact),
                    frozenset((f"W₀·Δx: {branch}",)),
                ),
            ),
        )
    return State(init, fact, changes)


def _linear_backward(walk: Backward, node: Node, gradient: Signal) -> list[Piece]:
    weight = walk.inputs(node)[1]
    source, role = node.inputs
    fan_in, fan_out = _fans(walk, node)
    multiplier = walk.multiplier(node, role)
    columns = frozenset((len(walk.graph.shapes[role]) - 1,))
    back = through(gradient, weight.init, fan_out, columns)
    signal, because = back.signal, back.because
    branch = walk.assume.backward_weight
    if branch == "operator-norm":
        gain = operator_norm(extent(fan_out), extent(fan_in))
        bound = gradient.size + weight.init.size + gain
        signal = signal.mapped(lambda term: type(term)(bound, term.odd))
        because = f"W₀ᵀ·g at the operator-norm bound, {n_to(gain)}"
    shared = tuple(dim for dim in atoms(walk.graph.shapes[source][:-1]))
    outer, how = walk.contract(gradient, walk.trained(source), shared)
    return [
        Piece(
            0,
            signal.shifted(multiplier),
            f"{role}ᵀ · ∂L/∂{node.output}: {because}",
            frozenset((f"W₀ᵀ·g: {branch}",)),
            (role,),
        ),
        Piece(
            1,
            outer.shifted(multiplier),
            f"∂L/∂{node.output} ⊗ {source}" + (f": {how}" if shared else ""),
            frozenset(),
            (source,),
        ),
    ]


def _linear_effect(walk: Forward, node: Node, step: Step) -> Expr:
    source, role = node.inputs
    fan_in, fan_out = _fans(walk, node)
    aligned = walk.assume.own_step == "aligned"
    return (
        walk.multiplier(node, role) + walk.states[source].trained + step.gain(extent(fan_in), extent(fan_out), aligned)
    )


register(
    Op(
        "linear",
        _linear_shape,
        _linear_forward,
        _linear_backward,
        _weight_tolerance,
        _linear_effect,
        ("aten.linear", "aten.mm", "aten.addmm", "aten.bmm", "aten.matmul"),
    )
)


# -- conv1d: depthwise and short, so that each channel is an entrywise product summed over a few taps --------------


def _conv_shape(shapes: Sequence[Shape], attrs: Mapping[str, Any]) -> Shape:
    x, weight = shapes
    if atoms(x) != atoms(weight[:-1]):
        raise DeriveError(
            f"a depthwise convolution of {shape_text(weight)} cannot take {shape_text(x)}",
            cure="its channels must be the input's axes",
        )
    return x


def _conv_forward(walk: Forward, node: Node) -> State:
    from widthwise.derive.forward import Change, State

    x, weight = walk.inputs(node)
    role = node.inputs[1]
    multiplier = walk.multiplier(node, role)
    init, _ = walk.contract(node, x.init, weight.init, (), "symmetry")
    init = Signal(init.shifted(multiplier).terms, x.init.rms * node.attrs["gain"])
    fact = walk.fact(node, init, f"{role} taps times {node.inputs[0]}, summed over a width-free number of taps")
    changes = walk.own_step(node, role)
    if x.change is not None:
        size = multiplier + weight.init.size + x.change
        changes += (
            Change(
                size,
                False,
                Fact(
                    f"change of {node.output} from upstream",
                    size,
                    "entrywise: no sum over width",
                    (x.fact, weight.fact),
                ),
            ),
        )
    return State(init, fact, changes)


def _conv_backward(walk: Backward, node: Node, gradient: Signal) -> list[Piece]:
    weight = walk.inputs(node)[1]
    source, role = node.inputs
    multiplier = walk.multiplier(node, role)
    back = contract(gradient, weight.init, (), "symmetry").signal.shifted(multiplier)
    taps = contract(gradient, walk.trained(source), (), "symmetry").signal.shifted(multiplier)
    return [
        Piece(0, back, f"{role} taps times ∂L/∂{node.output}", frozenset(), (role,)),
        Piece(1, taps, f"∂L/∂{node.output} times {source}, summed over time", frozenset(), (source,)),
    ]


def _conv_effect(walk: Forward, node: Node, step: Step) -> Expr:
    source, role = node.inputs
    return walk.multiplier(node, role) + walk.states[source].trained + step.entry


register(
    Op(
        "conv1d",
        _conv_shape,
        _conv_forward,
        _conv_backward,
        _weight_tolerance,
        _conv_effect,
        ("aten.conv1d", "aten.convolution"),
        entrywise=(0, 1),
    )
)


# -- embedding: a row of the table per token --------------------------------------------------------------------


def _embedding_shape(shapes: Sequence[Shape], attrs: Mapping[str, Any]) -> Shape:
    return shapes[0][1:]


def _embedding_forward(walk: Forward, node: Node) -> State:
    from widthwise.derive.forward import State

    (table,) = walk.inputs(node)
    role = node.inputs[0]
    init = table.init.shifted(walk.multiplier(node, role))
    init = init.mapped(
        lambda term: type(term)(
            term.size,
            {flip: mean for flip, mean in term.odd.items() if flip.axes <= {dim.name for dim in atoms(node.shape)}},
        )
    )
    return State(
        init, walk.fact(node, init, f"one row of {role} per token: no sum over width"), walk.own_step(node, role)
    )


def _embedding_backward(walk: Backward, node: Node, gradient: Signal) -> list[Piece]:
    return [
        Piece(
            0,
            gradient.shifted(walk.multiplier(node, node.inputs[0])),
            f"∂L/∂{node.output} of the tokens that read the row",
        )
    ]


def _embedding_effect(walk: Forward, node: Node, step: Step) -> Expr:
    return walk.multiplier(node, node.inputs[0]) + step.entry


register(
    Op(
        "embedding",
        _embedding_shape,
        _embedding_forward,
        _embedding_backward,
        lambda slot: "weight",
        _embedding_effect,
        ("aten.embedding",),
    )
)
