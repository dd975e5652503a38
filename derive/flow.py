"""The gradient flow of one product of trained factors, dx/dt = ∂f/∂x, by midpoint steps whose length grows with x."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import hypot, inf, isfinite

from widthwise.derive.gaussian import FUNCTIONS
from widthwise.derive.product import Applied, Factor, Product, Tree, degree, factors

_STEP, _AWAY, _MOST_STEPS, _INSTANT = 0.1, 20.0, 250, 1e-30  # a step over x; where the rest may be known; no time


@dataclass(frozen=True)
class Place:
    """Where the flow is after ``time``: the factors x, their product ``value``, its gradient and that one's norm."""

    time: float
    x: Sequence[float]
    value: float
    slope: Sequence[float]
    speed: float


@dataclass(frozen=True)
class Flow:
    """dx/dt = ∂f/∂x for a product f, whose factors stand at ``places`` in x; where all are large f is of ``degree``."""

    tree: Product
    places: dict[str, int]
    degree: float

    @classmethod
    def of(cls, tree: Product) -> Flow:
        return cls(tree, {factor.tensor: index for index, factor in enumerate(factors(tree))}, degree(tree))

    def away(self, x: Sequence[float], limit: float) -> float:
        """The time after which x is infinite; ∞ if that is later than limit, or if x comes to rest or is not away
        after so many steps."""
        time = 0.0
        try:
            for place in self.follow(x):
                time, speed = place.time, place.speed
                if speed == 0.0 or time > limit:
                    return inf
                if not isfinite(speed):
                    break
                size = hypot(*place.x)
                if size > _AWAY and self._settled(place, size * speed):
                    time += size / speed / (self.degree - 2)  # on along a ray: dr/dt = speed (r/size)^(degree-1)
                    break
            else:
                return inf
        except OverflowError:  # an exponential: as good as infinite
            pass
        return max(time, _INSTANT) if time <= limit else inf

    def follow(self, x: Sequence[float]) -> Iterator[Place]:
        """Where x is before each of so many steps; fewer where it comes to rest or is infinite."""
        time = 0.0
        for _ in range(_MOST_STEPS):
            value, slope = self.at(x)
            speed = hypot(*slope)
            yield Place(time, x, value, slope, speed)
            if speed == 0.0 or not isfinite(speed):
                return
            length = _STEP * (0.3 + hypot(*x))
            half = length / 2 / speed
            _, ahead = self.at([at + half * by for at, by in zip(x, slope, strict=True)])
            speed = hypot(*ahead)
            if speed == 0.0:
                return
            time += length / speed
            x = [at + length / speed * by for at, by in zip(x, ahead, strict=True)]

    def _settled(self, place: Place, length: float) -> bool:
        """Whether x moves along itself, and f grows as its degree says, so that the rest is known."""
        along = sum(x * by for x, by in zip(place.x, place.slope, strict=True))
        if self.degree == inf:
            return along > 0.99 * length
        return along > 0.99 * length and abs(along - self.degree * place.value) < 0.05 * along

    def at(self, x: Sequence[float]) -> tuple[float, list[float]]:
        """f and ∂f/∂x."""
        value, uses = self._read(self.tree, x)
        slope = [0.0] * len(x)
        for index, by in uses:
            slope[index] += by
        return value, slope

    def _read(self, tree: Tree, x: Sequence[float]) -> tuple[float, list[tuple[int, float]]]:
        """A tree's value, and its derivative by each use of a factor."""
        match tree:
            case Factor(tensor=tensor):
                index = self.places[tensor]
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
