"""Coordinate sizes with coherence: what a tensor's typical entry is made of, and how inner products add up.

A :class:`Signal` is a sum of terms. Each term has a size and the sign flips it is *odd* under: a flip is a source
(a random weight) with the axes along which single entries flip. If a flip negates the terms of a sum one by one
and leaves their joint law alone, the sum is incoherent (theory: sign symmetry at initialization). A function that
is not odd breaks a flip and leaves a mean, remembered as the fraction mean/rms of the broken flip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from math import inf, sqrt

from sympy import Expr

from widthwise.derive.exponents import HALF, ZERO, largest
from widthwise.derive.graph import Dim


@dataclass(frozen=True)
class Flip:
    """Flipping the signs of ``source`` entry by entry along ``axes``; ``side`` tells rows from columns, also of a
    square weight, whose rows and columns have one and the same axis."""

    source: str
    axes: frozenset[str]
    side: int = 0


Odd = Mapping[Flip, float]  # flip → mean/rms that remains under it; 0 where the flip is exact


@dataclass(frozen=True)
class Term:
    size: Expr
    odd: Odd


@dataclass(frozen=True)
class Signal:
    """A sum of terms, and the constant ``rms`` of its leading one at unit base values (used for crossovers only)."""

    terms: tuple[Term, ...]
    rms: float = 1.0

    @property
    def size(self) -> Expr:
        return largest(term.size for term in self.terms)

    def shifted(self, by: Expr) -> Signal:
        return replace(self, terms=tuple(replace(term, size=term.size + by) for term in self.terms))

    def mapped(self, fn: Callable[[Term], Term]) -> Signal:
        return replace(self, terms=tuple(fn(term) for term in self.terms))


def signal(size: Expr, odd: Odd | None = None, rms: float = 1.0) -> Signal:
    return Signal((Term(size, odd or {}),), rms)


def merged(terms: Iterable[Term]) -> tuple[Term, ...]:
    """Terms with the same flips, joined; their means cannot be told apart any more, so the larger one stays."""
    together: dict[frozenset[Flip], Term] = {}
    for term in terms:
        key = frozenset(term.odd)
        if key in together:
            other = together[key]
            together[key] = Term(
                largest((term.size, other.size)), {flip: max(term.odd[flip], other.odd[flip]) for flip in key}
            )
        else:
            together[key] = term
    return tuple(together.values())


def through(x: Signal, weight: Signal, over: tuple[Dim, ...], kept: frozenset[int]) -> Contraction:
    """Multiply by a random weight and sum over its other sides; the result is odd along the ``kept`` sides."""

    def sides(odd: Odd, wanted: bool) -> dict[Flip, float]:
        return {flip: mean for flip, mean in odd.items() if (flip.side in kept) == wanted}

    outcome = contract(x, weight.mapped(lambda term: Term(term.size, sides(term.odd, False))), over, "symmetry")
    rows = sides(weight.terms[0].odd, True)
    return replace(outcome, signal=outcome.signal.mapped(lambda term: Term(term.size, {**term.odd, **rows})))


def added(signals: Iterable[Signal]) -> Signal:
    """The sum of several signals."""
    parts = list(signals)
    return Signal(merged(term for part in parts for term in part.terms), sqrt(sum(part.rms**2 for part in parts)))


@dataclass(frozen=True)
class Partial:
    """A contraction whose terms share a small mean ``fraction``: coherent beyond ``crossover`` entries."""

    axis: Dim
    fraction: float

    @property
    def crossover(self) -> float:
        return self.fraction**-2 if self.fraction else inf


@dataclass(frozen=True)
class Contraction:
    """The outcome of multiplying two signals and summing over axes."""

    signal: Signal
    because: str
    partial: tuple[Partial, ...] = ()


def contract(a: Signal, b: Signal, over: tuple[Dim, ...], branch: str, means: str = "ignored") -> Contraction:
    """Multiply two signals and sum over ``over``.

    ``branch`` is ``symmetry`` (decide by flips), ``aligned`` or ``incoherent``; ``means`` says how a mean that a
    nonlinearity left is treated (see Assumptions.nonlinear_mean). Summing n^p terms of size n^t gives n^(t+p)
    when they are coherent and n^(t+p/2) when they are not.
    """
    terms: list[Term] = []
    leading: tuple[Expr, str, tuple[Partial, ...]] | None = None
    for left in a.terms:
        for right in b.terms:
            size, reasons, partial = left.size + right.size, [], []
            for axis in over:
                coherent, reason, met = _coherent(left.odd, right.odd, axis, branch, means)
                size += axis.exponent if coherent else axis.exponent * HALF
                reasons.append(reason)
                partial += met
            terms.append(Term(size, _remaining(left.odd, right.odd, over)))
            if leading is None or largest((size, leading[0])) != leading[0]:
                leading = (size, "; ".join(reasons), tuple(partial))
    assert leading is not None
    return Contraction(Signal(merged(terms), a.rms * b.rms), leading[1], leading[2])


def _coherent(left: Odd, right: Odd, axis: Dim, branch: str, means: str) -> tuple[bool, str, list[Partial]]:
    if axis.exponent == ZERO:
        return True, f"{axis} is width-free", []
    if branch == "aligned":
        return True, f"coherent over {axis} (aligned)", []
    if branch == "incoherent":
        return False, f"incoherent over {axis} (assumed)", []
    fraction, witness = 1.0, ""
    for mine, other in ((right, left), (left, right)):
        touching = {flip: mean for flip, mean in mine.items() if axis.name in flip.axes and flip not in other}
        if touching:
            flip = min(touching, key=lambda each: (touching[each], each.source))
            fraction *= touching[flip]
            if touching[flip] == 0.0:
                witness = witness or flip.source
    if fraction == 0.0:
        return False, f"incoherent over {axis} (flipping {witness} along {axis} negates the terms one by one)", []
    if fraction == 1.0:
        return True, f"coherent over {axis} (no sign flip negates single terms)", []
    met = Partial(axis, fraction)
    about = f"mean fraction {fraction:.2g} left by a nonlinearity, crossover at {axis} ≈ {met.crossover:.0f}"
    if means == "coherent" or (means == "crossover" and met.crossover <= axis.practical):
        return True, f"coherent over {axis} ({about})", [met]
    return False, f"incoherent over {axis} below its crossover ({about})", [met]


def _remaining(left: Odd, right: Odd, over: tuple[Dim, ...]) -> Odd:
    """Flips of a product (those of both factors cancel), as joint flips once an axis is summed away."""
    gone = {axis.name for axis in over}
    remaining: dict[Flip, float] = {}
    for flip in left.keys() ^ right.keys():
        mean = left[flip] if flip in left else right[flip]
        if axes := flip.axes - gone:
            joint = Flip(flip.source, axes, flip.side)
            remaining[joint] = min(mean, remaining.get(joint, 1.0))
    return remaining
