"""How much sooner the first of N products of trained factors gets away in a wider model: the flow, integrated.

Where steps follow gradients the factors x of a channel move as dx/dt ∝ ∂f/∂x of their product f, and a product of
degree above two is infinite after some time, which depends on where its factors begin. With T(N) the median time of the
first of N, the largest stable learning rate scales as T does. Far out, and without nonlinearities, T ∝ (ln N)^-(p-2)/2
for p factors (:mod:`widthwise.derive.channels`); SiLU between them makes it fall faster at the widths people train.

P(T < t) for one channel is summed by directional simulation (Ditlevsen, Melchers & Gluver 1990, Comput. Struct. 36(2)):
along each of evenly spread directions of the normal draws the radius from which the product is away by t is looked up,
and of the radius the law is known (chi). That leaves ±0.01 of a power, where plain draws leave ±0.1 of ten times as
many.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import erfc, exp, gamma, hypot, inf, log, sqrt
from statistics import NormalDist

from sympy import Expr, Rational

from widthwise.derive.exponents import ZERO
from widthwise.derive.gaussian import FUNCTIONS
from widthwise.derive.laws import begins
from widthwise.derive.product import Applied, Factor, Product, Tree, degree, factors

CHANNELS = (256, 4096)
"""Where the power of ln N is taken: the numbers of channels that people's models have. (A tensor's axis is held to be
at most 4096 below the crossovers, see :class:`widthwise.derive.graph.Dim`.)"""

RESOLUTION = 20
"""Powers are rounded to a twentieth; what is left of them is 1 % of a learning rate from 256 to 4096 channels."""

_DIRECTIONS = 1000
_RADII = tuple(5.8 * 0.82**step for step in range(8))
_STEP, _AWAY, _MOST_STEPS = 0.1, 20.0, 200
_PATIENCE = (4.0, 32.0, 256.0)


def power(tree: Product) -> Expr:
    """The exponent of ln N by which a learning rate has to scale so that the first of N gets away no sooner; 0 where
    the product does not get away in finite time."""
    if degree(tree) <= 2:
        return ZERO
    names = {factor: str(index) for index, factor in enumerate(factors(tree))}
    return Rational(round(RESOLUTION * _power(_renamed(tree, names), *CHANNELS)), RESOLUTION)


def _renamed(tree: Product, names: dict[Factor, str]) -> Product:
    """The same product whatever its factors are called, so that it is integrated once."""
    parts: list[Factor | Applied | Product] = []
    for part in tree.parts:
        match part:
            case Factor(law=law):
                parts.append(Factor("", names[part], law))
            case Applied(function, inner):
                parts.append(Applied(function, _renamed(inner, names)))
            case Product():
                parts.append(_renamed(part, names))
    return Product(tuple(parts))


@lru_cache(maxsize=256)
def _power(tree: Product, fewer: int, more: int) -> float:
    early, late = (first_away(tree, channels) for channels in (fewer, more))
    if early == inf:
        return 0.0
    return log(late / early) / log(log(more) / log(fewer))


def first_away(tree: Product, channels: int) -> float:
    """The median time after which the first of so many channels is away, in units of a unit product's own; infinite
    where half of the time none ever is."""
    wanted = 1 - 0.5 ** (1 / channels)
    for patience in _PATIENCE:
        times = _times(tree, patience)
        if times.share(times.cut) >= wanted:
            low, high = times.cut - 12.0, times.cut
            for _ in range(40):
                middle = (low + high) / 2
                low, high = (middle, high) if times.share(middle) < wanted else (low, middle)
            return exp(low)
    return inf


@dataclass(frozen=True)
class _Times:
    """For each direction the (ln radius, ln time) with which a product gets away, from far to near; times above e^cut
    were not followed, and are infinite. ``drawn`` is the number of factors that are drawn."""

    rays: tuple[tuple[tuple[float, float], ...], ...]
    cut: float
    drawn: int

    def share(self, at: float) -> float:
        """The share of all draws that is away by e^at."""
        return sum(_away_by(at, ray, self.drawn) for ray in self.rays) / _DIRECTIONS


def _away_by(at: float, ray: Sequence[tuple[float, float]], drawn: int) -> float:
    """The share of a direction's draws that is away by e^at: between two radii, as far as the time interpolated is
    soon enough. (Farther out is mostly sooner, but a factor in the flat part of a function may have to come from near.)
    """
    total = 0.0
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
    """Where between two times a third lies; halfway to one that is infinite."""
    return 0.5 if late == inf else (at - soon) / (late - soon)


def _beyond(radius: float, dimensions: int) -> float:
    """P(χ > radius), with so many degrees of freedom."""
    half = radius * radius / 2
    if half > 700:
        return 0.0
    odd = dimensions % 2
    total, term = 0.0, 1.0 if not odd else sqrt(half) / gamma(1.5)
    for index in range(dimensions // 2):
        total += term
        term *= half / (index + 1 + odd / 2)
    return (erfc(sqrt(half)) if odd else 0.0) + exp(-half) * total


@lru_cache(maxsize=64)
def _times(tree: Product, patience: float) -> _Times:
    names = factors(tree)
    laws = [begins(factor.law) for factor in names]
    drawn = [index for index, (_, std) in enumerate(laws) if std > 0]
    flow = _Flow(tree, {factor.tensor: index for index, factor in enumerate(names)}, degree(tree))

    def away(direction: Sequence[float], radius: float, limit: float) -> float:
        x = [mean for mean, _ in laws]
        for index, along in zip(drawn, direction, strict=True):
            x[index] += laws[index][1] * radius * along
        return flow.away(x, limit)

    directions = list(_directions(len(drawn), _DIRECTIONS)) if drawn else []
    # Followed no longer than several times what the fastest of some directions takes from where the largest draws lie.
    limit, typical = inf, sqrt(2 * log(CHANNELS[0]))
    for direction in directions[: _DIRECTIONS // 5]:
        limit = min(limit, patience * away(direction, typical, limit))
    if limit == inf:
        return _Times((), inf, len(drawn))
    rays = []
    for direction in directions:
        times: list[float] = []
        for radius in _RADII:
            times.append(away(direction, radius, limit))
            if times[-1] == inf != min(times):
                break  # nearer still is later still
        if min(times) < inf:
            rays.append(tuple((log(r), log(t) if t < inf else inf) for r, t in zip(_RADII, times, strict=False)))
    return _Times(tuple(rays), log(limit), len(drawn))


def _directions(dimensions: int, number: int) -> Iterator[list[float]]:
    """Unit vectors, evenly spread: normal quantiles of a Kronecker sequence (steps are powers of the root of
    x^(d+1) = x + 1, Roberts 2018)."""
    root = 2.0
    for _ in range(60):
        root = (1 + root) ** (1 / (dimensions + 1))
    quantile = NormalDist().inv_cdf
    for index in range(1, number + 1):
        at = ((0.5 + index * root ** -(axis + 1)) % 1.0 for axis in range(dimensions))
        vector = [quantile(min(max(each, 1e-12), 1 - 1e-12)) for each in at]
        length = hypot(*vector)
        yield [each / length for each in vector]


@dataclass(frozen=True)
class _Flow:
    """dx/dt = ∂f/∂x for a product f, whose factors stand at ``place`` in x; far out f grows as x^``degree``."""

    tree: Product
    place: dict[str, int]
    degree: float

    def away(self, x: list[float], limit: float) -> float:
        """The time after which x is infinite, by midpoint steps whose length grows with x; ∞ if later than limit, or if
        x comes to rest."""
        time = 0.0
        for _ in range(_MOST_STEPS):
            size = hypot(*x)
            slope = self.slope(x)
            speed = hypot(*slope)
            if size > _AWAY:  # from here on along a ray: dr/dt = speed (r/size)^(degree-1)
                time += size / speed / (self.degree - 2)
                break
            length = _STEP * (0.3 + size)
            if speed == 0.0:
                return inf
            half = length / 2 / speed
            ahead = self.slope([at + half * by for at, by in zip(x, slope, strict=True)])
            speed = hypot(*ahead)
            if speed == 0.0:
                return inf
            time += length / speed
            x = [at + length / speed * by for at, by in zip(x, ahead, strict=True)]
            if time > limit:
                break
        else:
            return inf
        return time if time <= limit else inf

    def slope(self, x: Sequence[float]) -> list[float]:
        found = [0.0] * len(x)
        for index, value in self._read(self.tree, x)[1]:
            found[index] += value
        return found

    def _read(self, tree: Tree, x: Sequence[float]) -> tuple[float, list[tuple[int, float]]]:
        """A tree's value, and its derivative by each use of a factor."""
        match tree:
            case Factor(tensor=tensor):
                index = self.place[tensor]
                return x[index], [(index, 1.0)]
            case Applied(function, inner):
                z, slopes = self._read(inner, x)
                value, steep = _differentiated(function, z)
                return value, [(index, steep * each) for index, each in slopes]
        parts = [self._read(part, x) for part in tree.parts]
        before, total = [], 1.0
        for value, _ in parts:
            before.append(total)
            total *= value
        found, after = [], 1.0
        for (value, slopes), ahead in zip(reversed(parts), reversed(before), strict=True):
            found += [(index, ahead * after * each) for index, each in slopes]
            after *= value
        return total, found


def _differentiated(function: str, z: float, step: float = 1e-4) -> tuple[float, float]:
    f = FUNCTIONS[function]
    return f(z), (f(z + step) - f(z - step)) / (2 * step)
