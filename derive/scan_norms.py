"""Norms behind a scan, and what sizes of typical entries do not tell of them.

**Near zero.** The first token of a sequence reads a state that holds a single write: o₁ = β (q·k) v, one value times
one inner product; the next few read few. Where the terms of q·k have independent signs, it is as often near zero as
anywhere else, P(|q·k| < s) ∝ s, so that the smallest of N such numbers (one a head, layer and sequence) is ∝ 1/N of a
typical one. A norm behind divides by it: that token comes out at full size whatever it was, gradients through the norm
are up to N times the typical ones, and curvature up to N². Only the norm's eps ends it. Where q·k is coherent it
concentrates about its mean, and none is near zero.

**Outgrown.** Steps of what makes q and k follow ∂L/∂q ∝ k and ∂L/∂k ∝ q, so that they move q·k coherently, from the
first one on. Where q·k itself begins incoherent, they move it by more than it is, by more in a wider model. A norm
behind keeps its output at Θ(1) all the same, and so no bound is broken; but the output turns with every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from sympy import Expr

from widthwise.derive.channels import summed_by, trained_in
from widthwise.derive.exponents import HALF, ONE, ZERO, at_most
from widthwise.derive.forward import Forward
from widthwise.derive.graph import Graph, Group, Node, atoms, extent
from widthwise.derive.ops.einsum import product_change
from widthwise.derive.ops.scan import key_axis
from widthwise.derive.signal import contract


@dataclass(frozen=True)
class NearZero:
    """A norm of a scan's output that may be next to nothing, and the axes along which there is one q·k a place."""

    scan: Node
    norm: Node
    places: Group

    @property
    def exponent(self) -> Expr:
        """How the largest gradient through the norm grows over the typical one, as the number of places does."""
        return extent(self.places.dims)


@dataclass(frozen=True)
class Outgrown:
    """A norm of a scan's output that steps move by n^``excess`` times its size, and the roles whose steps do so."""

    scan: Node
    norm: Node
    roles: tuple[str, ...]
    excess: Expr


def near_zero(walk: Forward) -> Iterator[NearZero]:
    """Every norm of a scan's output whose inner products no mean keeps from zero. A norm over several heads at once
    averages over their inner products, which are not near zero together."""
    for scan, norm in _normed(walk.graph):
        heads = atoms(walk.graph.shapes[scan.inputs[0]])[:-1]
        if not set(heads) & set(norm.attrs["axis"].dims) and not _concentrated(walk, scan):
            yield NearZero(scan, norm, Group(heads))


def outgrown(walk: Forward) -> Iterator[Outgrown]:
    """Every norm of a scan's output whose q·k begins incoherent and is moved coherently."""
    for scan, norm in _normed(walk.graph):
        q, k = walk.inputs(scan)[:2]
        keys = key_axis(walk, scan)
        moved = product_change(walk, q, k, keys)
        begun = contract(q.init, k.init, keys, walk.assume.activations, walk.assume.nonlinear_mean).signal.size
        if moved is not None and not at_most(moved, begun):
            roles = (role for name in scan.inputs[:2] for role in trained_in(walk.graph, name))
            yield Outgrown(scan, norm, tuple(dict.fromkeys(roles)), moved - begun)


def _normed(graph: Graph) -> Iterator[tuple[Node, Node]]:
    """Scans with the norms of their outputs."""
    for norm in graph.ordered:
        if norm.op in ("rms_norm", "layer_norm", "l2_norm"):
            scan = _scan_before(graph, norm.inputs[0])
            if scan is not None:
                yield scan, norm


def _scan_before(graph: Graph, tensor: str) -> Node | None:
    """The scan that makes a tensor, up to factors: of its own, or of other tensors entry by entry."""
    seen, ahead = set[str](), [tensor]
    while ahead:
        maker = graph.makers.get(name := ahead.pop())
        if name in seen or maker is None:
            continue
        seen.add(name)
        if maker.op == "scan":
            return maker
        if maker.op in ("scale", "reshape") or (maker.op == "einsum" and not summed_by(graph, maker)):
            ahead += maker.inputs
    return None


def _concentrated(walk: Forward, scan: Node) -> bool:
    """Whether the terms of q·k, before training, share a sign: then it has a mean, beside which its spread is small. On
    an axis that does not grow a mean counts from its crossover on, whatever the regime."""
    q, k = (state.init for state in walk.inputs(scan)[:2])
    (axis,) = key_axis(walk, scan)
    means = "crossover" if axis.exponent == ZERO else walk.assume.nonlinear_mean
    product = contract(q, k, (replace(axis, exponent=ONE),), "symmetry", means).signal
    return not at_most(product.size, q.size + k.size + HALF)
