"""How much sooner the first of N products of trained factors gets away in a wider model: the flow, integrated.

Where steps follow gradients the factors x of a channel move as dx/dt ∝ ∂f/∂x of their product f, and a product of
degree above two is infinite after some time, which depends on where its factors begin. With T(N) the median time of the
first of N, the largest stable learning rate scales as T does. Far out, and without nonlinearities, T ∝ (ln N)^-(p-2)/2
for p factors (:mod:`widthwise.derive.channels`); SiLU between them makes it fall faster at the widths people train.
Assumed: all factors move at one rate, in units in which each begins at the scale of its base law.

P(T < t) for one channel is summed by directional simulation (Ditlevsen, Melchers & Gluver 1990, Comput. Struct. 36(2)):
along each of evenly spread directions of the normal draws the radius from which the product is away by t is looked up,
and of the radius the law is known (chi). For three to five factors that leaves ±0.02 of a power; a million plain draws
leave ±0.01 to ±0.04.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import erfc, exp, expm1, fsum, gamma, hypot, inf, log, sqrt
from statistics import NormalDist

from sympy import Expr, Rational

from widthwise.derive.bisection import bisected
from widthwise.derive.exponents import ZERO
from widthwise.derive.flow import Flow
from widthwise.derive.laws import begins
from widthwise.derive.product import Product, counted, degree, factors, ordered

CHANNELS = (256, 4096)
"""Where the power of ln N is taken, about what trained models have; it is used beyond too."""

RESOLUTION = 20
"""Powers are rounded to a twentieth: 1 % of a learning rate from 256 to 4096 channels."""

_DIRECTIONS, _ENOUGH = 4000, 400  # to try at most, and of those with a draw that gets away
_RADII, _FARTHEST, _NEAREST = 8, 1e-7, 0.8  # how many, and the share of draws beyond the first and the last
_TRIES, _AMPLE = 14, 1.4  # how often to look three times as far; times are followed for so much longer than is asked


def power(tree: Product) -> Expr:
    """The exponent of ln N by which a learning rate has to scale so that the first of N gets away no sooner; 0 where
    all channels begin alike, or none of thousands gets away. Where some do, but in fewer than half of all models, it is
    the limit of many."""
    if degree(tree) <= 2:
        return ZERO
    found = exponent(tree, *CHANNELS)
    if found is not None:
        return Rational(round(RESOLUTION * found), RESOLUTION)
    return limit(tree) if _times(ordered(tree), CHANNELS[0]).rays else ZERO


def limit(tree: Product) -> Expr:
    """The same exponent as N tends to infinity: -(p-2)/2 for a product of degree p, 0 for p ≤ 2. An exponential has
    no such limit, and its factors are counted."""
    return -Rational(max(0, counted(tree) - 2), 2)


def exponent(tree: Product, fewer: int, more: int) -> float | None:
    """The exponent of ln N in T(N) between two numbers of channels; None where the first of fewer has no T."""
    times = _times(ordered(tree), fewer)
    early, late = times.first(fewer), times.first(more)
    return None if early == inf else log(late / early) / log(log(more) / log(fewer))


def first_away(tree: Product, channels: int) -> float:
    """The median time after which the first of so many channels is away, where dx/dt = ∂f/∂x; infinite where more
    often than not none gets away."""
    return _times(ordered(tree), channels).first(channels)


@dataclass(frozen=True)
class _Times:
    """For each direction the (ln radius, ln time) with which a product gets away, from far to near. Times above e^cut
    were not followed: of each direction the first of them is extrapolated, one before it may be infinite. ``drawn`` is
    the number of factors that are drawn."""

    rays: tuple[tuple[tuple[float, float], ...], ...]
    directions: int
    cut: float
    drawn: int

    def first(self, channels: int) -> float:
        """The median time of the first of so many."""
        wanted = _wanted(channels)
        if self.share(self.cut) < wanted:
            return inf
        soonest = min(time for ray in self.rays for _, time in ray)
        return exp(bisected(lambda at: self.share(at) >= wanted, soonest - 1.0, self.cut))

    def share(self, at: float) -> float:
        """The share of all draws that is away by e^at."""
        return fsum(_away_by(at, ray, self.drawn) for ray in self.rays) / max(1, self.directions)


def _wanted(channels: int) -> float:
    """The share of channels that is away when in half of all models the first of so many is."""
    return -expm1(-log(2) / channels)


def _away_by(at: float, ray: Sequence[tuple[float, float]], drawn: int) -> float:
    """The share of a direction's draws that is away by e^at: between two radii, as far as the time interpolated is
    soon enough. (Farther out is mostly sooner, but a factor in the flat part of a function may have to come from near.)
    """
    total = _beyond(exp(ray[0][0]), drawn) if ray[0][1] <= at else 0.0
    for (far, first), (near, second) in pairwise(ray):
        if first > at and second > at:
            continue
        if first <= at < second:
            near = far + (near - far) * _crossing(at, first, second)
        elif second <= at < first:
            far = near + (far - near) * _crossing(at, second, first)
        total += _beyond(exp(near), drawn) - _beyond(exp(far), drawn)
    return total


def _crossing(at: float, soon: float, late: float) -> float:
    """Where between two times a third lies; halfway to one that was not followed."""
    return 0.5 if late == inf else (at - soon) / (late - soon)


def _beyond(radius: float, dimensions: int) -> float:
    """P(χ > radius), with so many degrees of freedom."""
    half = radius * radius / 2
    odd = dimensions % 2
    total, term = 0.0, sqrt(half) / gamma(1.5) if odd else 1.0
    for index in range(dimensions // 2):
        total += term
        term *= half / (index + 1 + odd / 2)
    return exp(-half) * total + (erfc(sqrt(half)) if odd else 0.0)


def _radius(share: float, dimensions: int) -> float:
    """The radius that such a share of draws exceeds."""
    return bisected(lambda radius: _beyond(radius, dimensions) <= share, 0.0, 10.0 + sqrt(dimensions))


@lru_cache(maxsize=64)
def _times(tree: Product, channels: int) -> _Times:
    """When draws get away, followed for as long as it takes the first of so many channels."""
    names = factors(tree)
    laws = [begins(factor.law) for factor in names]
    drawn = [index for index, (_, std) in enumerate(laws) if std > 0]
    if not drawn:  # all channels are one channel
        return _Times((), 0, inf, 0)
    flow = Flow.of(tree)

    def away(direction: Sequence[float], radius: float, limit: float) -> float:
        x = [mean for mean, _ in laws]
        for index, along in zip(drawn, direction, strict=True):
            x[index] += laws[index][1] * radius * along
        return flow.away(x, limit)

    farthest, nearest = (_radius(share, len(drawn)) for share in (_FARTHEST, _NEAREST))
    radii = [farthest * (nearest / farthest) ** (step / (_RADII - 1)) for step in range(_RADII)]

    def followed(longest: float, enough: int) -> _Times:
        rays: list[tuple[tuple[float, float], ...]] = []
        tried = 0
        for direction in _directions(len(drawn)):
            tried += 1
            if min(away(direction, radii[probe], longest / _AMPLE) for probe in (0, _RADII // 2)) < inf:
                rays.append(_ray(((r, away(direction, r, longest)) for r in radii), log(longest), flow.degree))
            if len(rays) == enough:
                break
        return _Times(tuple(rays), tried, log(longest), len(drawn))

    # Times are followed for somewhat longer than what is asked for: a few directions tell how long that is.
    longest, typical = inf, _radius(1 / channels, len(drawn))
    for tried, direction in enumerate(_directions(len(drawn))):
        longest = min(longest, away(direction, typical, longest))
        if tried >= _ENOUGH and longest < inf:
            break
    if longest == inf:
        return _Times((), 0, inf, len(drawn))
    for _ in range(_TRIES):
        longest *= 3
        few = followed(longest, _ENOUGH // 10)
        if few.share(few.cut - log(_AMPLE)) >= _wanted(channels):
            longest = _AMPLE * few.first(channels) * 1.2  # few directions are not that sure
            break
    return followed(longest, _ENOUGH)


def _ray(points: Iterator[tuple[float, float]], cut: float, degree: float) -> tuple[tuple[float, float], ...]:
    """(ln radius, ln time) from far to near, to where the product is not away by the cut: nearer still is taken to be
    later still, and the time there (of draws that come to rest too) to be what its degree makes of the last one."""
    ray: list[tuple[float, float]] = []
    for radius, time in points:
        at, late = log(radius), log(time) if time < inf else inf
        if late == inf and ray and ray[-1][1] < inf:
            far, soon = ray[-1]
            ray.append((at, max(cut, soon + min(degree - 2, 50.0) * (far - at))))
            break
        ray.append((at, late))
    return tuple(ray)


def _directions(dimensions: int) -> Iterator[list[float]]:
    """Unit vectors, evenly spread: normal quantiles of a Kronecker sequence (steps are powers of the root of
    x^(d+1) = x + 1, Roberts 2018)."""
    if dimensions == 1:
        yield from ([1.0], [-1.0])
        return
    root = 2.0
    for _ in range(60):
        root = (1 + root) ** (1 / (dimensions + 1))
    quantile = NormalDist().inv_cdf
    for index in range(1, _DIRECTIONS + 1):
        at = ((0.5 + index * root ** -(axis + 1)) % 1.0 for axis in range(dimensions))
        vector = [quantile(each) for each in at]
        length = hypot(*vector)
        yield [each / length for each in vector]
