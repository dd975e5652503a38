"""Norms that divide by what may be near zero: outputs that begin as one number times a vector.

The first token of a sequence reads a state that holds a single write: o₁ = β (q·k) v, one value times one inner
product; the next few read few. Where the terms of q·k have independent signs, it is as often near zero as anywhere
else, P(|q·k| < s) ∝ s, so that the smallest of N such numbers (one a head, layer and sequence) is ∝ 1/N of a typical
one. A norm behind divides by it: that token comes out at full size whatever it was, gradients through the norm are up
to N times the typical ones, and curvature up to N². Only the norm's eps ends it. Sizes are those of typical entries,
so no size of this engine's shows it. Where q·k is coherent it concentrates about its mean, and none is near zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sympy import Expr

from widthwise.derive.exponents import HALF, at_most
from widthwise.derive.forward import Forward
from widthwise.derive.graph import Group, Node, atoms, extent


@dataclass(frozen=True)
class Tail:
    """A norm of a scan's output: the axes beside the one it goes over, each place along which has a norm of its own."""

    scan: Node
    norm: Node
    beside: Group

    @property
    def exponent(self) -> Expr:
        """How the largest gradient through the norm grows over the typical one, as the number of places does."""
        return extent(self.beside.dims)


def tails(walk: Forward) -> Iterator[Tail]:
    """Every norm of a scan's output whose inner products no mean keeps from zero."""
    for norm in walk.graph.ordered:
        if norm.op in ("rms_norm", "layer_norm", "l2_norm"):
            scan = _scan_before(walk, norm)
            if scan is not None and not _concentrated(walk, scan):
                places = atoms(walk.graph.shapes[norm.inputs[0]])[: -len(norm.attrs["axis"].dims)]
                yield Tail(scan, norm, Group(places))


def _scan_before(walk: Forward, norm: Node) -> Node | None:
    maker = walk.graph.makers.get(norm.inputs[0])
    while maker is not None and maker.op in ("scale", "reshape"):
        maker = walk.graph.makers.get(maker.inputs[0])
    return maker if maker is not None and maker.op == "scan" else None


def _concentrated(walk: Forward, scan: Node) -> bool:
    """Whether q·k is larger than terms of independent signs make it: then it has a mean, beside which its spread is
    small."""
    q, k, v, *gates = (state.init.size for state in walk.inputs(scan))
    strength = gates[-1:] if scan.attrs["strength"] else []
    score = walk.states[scan.output].init.size - sum([v, *strength], scan.attrs["power"])
    keys = atoms(walk.graph.shapes[scan.inputs[0]])[-1:]
    return not at_most(score, q + k + extent(keys) * HALF)
