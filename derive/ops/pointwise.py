"""Nonlinearities with a scale of their own: they tolerate a change of Θ(1) and may leave a mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from widthwise.derive.exponents import ZERO, at_most
from widthwise.derive.gaussian import moments
from widthwise.derive.graph import Node
from widthwise.derive.ops.registry import Op, Piece, always, register
from widthwise.derive.signal import Flip, Signal, Term

if TYPE_CHECKING:
    from widthwise.derive.backward import Backward
    from widthwise.derive.forward import Forward, State


@dataclass(frozen=True)
class Nonlinearity:
    """``odd``: f(−z) = −f(z). ``offset``: f(0) ≠ 0, so that the output is Θ(1) whatever the input does."""

    odd: bool = False
    offset: bool = False
    linear_at_zero: bool = True


NONLINEARITIES: Mapping[str, Nonlinearity] = {
    "silu": Nonlinearity(),
    "gelu": Nonlinearity(),
    "relu": Nonlinearity(linear_at_zero=False),
    "tanh": Nonlinearity(odd=True),
    "sigmoid": Nonlinearity(offset=True),
    "softplus": Nonlinearity(offset=True),
    "exp": Nonlinearity(offset=True),
    "softmax": Nonlinearity(offset=True),
}


def _forward(walk: Forward, node: Node) -> State:
    from widthwise.derive.facts import Fact
    from widthwise.derive.forward import Change, State

    (x,) = walk.inputs(node)
    source = node.inputs[0]
    init, because = _output(node.op, x.init)
    fact = walk.fact(node, init, because.format(f=node.op, x=source))
    changes: tuple[Change, ...] = ()
    if x.change is not None:
        changes = (
            Change(
                x.change,
                False,
                Fact(f"change of {node.output}", x.change, f"{node.op} passes a change of its input on", (x.fact,)),
            ),
        )
    return State(init, fact, changes)


def _output(name: str, x: Signal) -> tuple[Signal, str]:
    kind = NONLINEARITIES[name]
    full_size = at_most(ZERO, x.size)  # the input is of order one, so the function's shape is felt
    mean, rms = (
        (1.0, 1.0)
        if name == "softmax"
        else moments(name, round(x.rms, 6))
        if full_size or name == "relu"
        else (1.0, x.rms)
    )
    if kind.odd:
        return Signal(x.terms, rms), "{f} is odd: it keeps every sign flip of {x}"
    if kind.offset:
        odd = _common(x, mean) if full_size and mean < 1.0 else {}
        return Signal((Term(ZERO, odd),), rms), "{f}({x}) is Θ(1), and not odd: it has a mean"
    if not full_size and kind.linear_at_zero:
        return Signal(x.terms, rms), "{f} is linear near zero, where {x} lies"
    return (
        Signal((Term(x.size, _common(x, mean)),), rms),
        f"{{f}}({{x}}) is as large as {{x}}, and not odd: it leaves a mean of {mean:.2g} of its rms",
    )


def _common(x: Signal, mean: float) -> dict[Flip, float]:
    """Flips that negate every leading term, each now broken down to the mean the function leaves."""
    leading = [term.odd for term in x.terms if at_most(x.size, term.size)]
    return {
        flip: max(mean, *(odd[flip] for odd in leading)) for flip in leading[0] if all(flip in odd for odd in leading)
    }


def _backward(walk: Backward, node: Node, gradient: Signal) -> list[Piece]:
    return [Piece(0, gradient, f"times {node.op}′, which is Θ(1)")]


_ATEN = {
    "silu": ("aten.silu",),
    "gelu": ("aten.gelu",),
    "relu": ("aten.relu",),
    "tanh": ("aten.tanh",),
    "sigmoid": ("aten.sigmoid",),
    "softplus": ("aten.softplus",),
    "exp": ("aten.exp",),
    "softmax": ("aten.softmax", "aten._softmax"),
}

for _name in NONLINEARITIES:
    register(
        Op(_name, lambda shapes, attrs: shapes[0], _forward, _backward, always("absolute"), None, _ATEN[_name], (0,))
    )
