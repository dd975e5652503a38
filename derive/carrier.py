"""Whether one channel of many carries what training adds to their sum, and what a learning rate has to stand then.

Of products of three and more trained factors one channel may get away (:mod:`widthwise.derive.escape`) before the
others have moved. If it alone lifts a mean over N channels by Θ(1), its product is N times a typical one and each of
its p factors N^(1/p). A channel's gradient is 1/N of its own slope, N^(1-1/p), and its learning rate N of the mean's,
so that the rate times the curvature along it is N^(1-2/p): a power of n, and what the rate has to fall by for the
largest curvature to stay what it is. Where many channels share the sum their factors stay Θ(1), and so does curvature.

Which of the two it is the flow of the product tells: models of a few hundred channels are drawn and followed until
their mean has risen by one. The more channels, the more is left to one, from three factors on, but slowly: between the
two the law is that of the limit, and asks for more than the widths people train show (docs/theory.md).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import inf
from random import Random
from statistics import median

from sympy import Expr, Rational

from widthwise.derive.exponents import ZERO
from widthwise.derive.flow import Flow
from widthwise.derive.laws import begins
from widthwise.derive.product import Product, counted, degree, factors, ordered

CHANNELS = 256
"""How many channels a model has of which it is asked, about those of a narrow trained one."""

_MODELS, _HALVINGS = 31, 30


def power(tree: Product) -> Expr:
    """The exponent of N by which a learning rate has to scale where one channel carries the sum; 0 where many do.

    >>> from widthwise.derive.product import Factor, product
    >>> from widthwise.derive.laws import NORMAL
    >>> power(product(*(Factor(name, name, NORMAL) for name in "abcdefgh")))
    -3/4
    """
    return Rational(2, counted(tree)) - 1 if degree(tree) > 2 and share(tree) >= 0.5 else ZERO


def share(tree: Product, channels: int = CHANNELS) -> float:
    """What part of a rise of their mean by one the channel has that has most of it, in the median of a few models."""
    return _share(ordered(tree), channels)


@lru_cache(maxsize=64)
def _share(tree: Product, channels: int) -> float:
    laws = [begins(factor.law) for factor in factors(tree)]
    if not any(std > 0 for _, std in laws):
        return 1 / channels  # all channels are one channel
    flow, draw = Flow.of(tree), Random(0).gauss

    def model() -> float:
        paths: list[_Path] = []
        alone = inf  # when the first of them has risen by as much as the sum has to
        for _ in range(channels):
            path = _Path.of(flow, [draw(mean, std) for mean, std in laws], channels, alone)
            paths.append(path)
            alone = min(alone, path.times[-1]) if path.rises[-1] == channels else alone
        return _largest(paths, alone, channels)

    return median(model() for _ in range(_MODELS))


@dataclass(frozen=True)
class _Path:
    """By how much a product has risen after some times, from 0 on. It never falls: df/dt = |∂f/∂x|²."""

    times: tuple[float, ...]
    rises: tuple[float, ...]

    @classmethod
    def of(cls, flow: Flow, x: Sequence[float], enough: float, longest: float) -> _Path:
        """Until it has risen enough, or for so long."""
        times, rises = [0.0], [0.0]
        try:
            first = flow.at(x)[0]
            for place in flow.follow(x):
                times.append(place.time)
                rises.append(place.value - first)
                if rises[-1] >= enough:
                    early, late = times[-2:]
                    times[-1] = early + (late - early) * (enough - rises[-2]) / (rises[-1] - rises[-2])
                    rises[-1] = enough
                if rises[-1] == enough or place.time > longest:
                    break
        except OverflowError:  # an exponential: as good as infinite
            times.append(times[-1])
            rises.append(enough)
        return cls(tuple(times), tuple(rises))

    def rise(self, time: float) -> float:
        """After a time, linear between two; after the last what it was then."""
        after = bisect_right(self.times, time)
        if after == len(self.times):
            return self.rises[-1]
        early, late = self.times[after - 1 : after + 1]
        return self.rises[after - 1] + (time - early) / (late - early) * (self.rises[after] - self.rises[after - 1])


def _largest(paths: Sequence[_Path], alone: float, enough: float) -> float:
    """The largest part of their sum when it has risen enough, after no longer than one alone takes; 0 where it never
    has."""
    low, high = 0.0, alone if alone < inf else max(path.times[-1] for path in paths)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        enough_by_then = sum(path.rise(middle) for path in paths) >= enough
        low, high = (low, middle) if enough_by_then else (middle, high)
    rises = [path.rise(high) for path in paths]
    return max(rises) / sum(rises) if sum(rises) >= 0.99 * enough else 0.0
