"""Whether one channel of many carries what training adds to their sum, and what a learning rate has to stand then.

Of products of three and more trained factors one channel may get away (:mod:`widthwise.derive.escape`) before the
others have moved. If it alone lifts a mean over N channels, 1/N Σ f, by Θ(1), its product f is N times a typical one
and each of its p factors N^(1/p); the mean's gradient by a factor is f/x/N = N^(-1/p). Learning rates are N times what
one number would have, for all channels to move as one does whatever N is. So the rate times the curvature along this
channel is N · N^(-2/p): a power of n, by which the rate has to fall for the largest curvature to stay what it is. Where
many channels share the sum their factors stay Θ(1), and so does curvature.

Which of the two it is the flow of the product tells: models of a few hundred channels are drawn and followed until
their mean has risen by one. Where one has about half of that, curvature grows by that power over some decades of N,
unevenly (docs/theory.md).
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

from widthwise.derive.bisection import bisected
from widthwise.derive.exponents import ZERO
from widthwise.derive.flow import Flow
from widthwise.derive.laws import begins
from widthwise.derive.product import Product, counted, degree, factors, ordered

ASKED = 256
"""How many channels the models have of which it is asked, about those of a narrow trained one."""

_MODELS = (15, 0.15), (63, 0.07), (255, 0.0)  # so many, more of them where the median is as near to a half


def power(tree: Product) -> Expr:
    """The exponent of N by which a learning rate has to scale where one channel carries the sum; 0 where many do.

    >>> from widthwise.derive.product import Factor, product
    >>> from widthwise.derive.laws import NORMAL
    >>> power(product(*(Factor(name, name, NORMAL) for name in "abcdefgh")))
    -3/4
    """
    if degree(tree) <= 2 or counted(tree) <= 2:  # of an exponential its factors count, which may be one
        return ZERO
    return Rational(2, counted(tree)) - 1 if share(tree) >= 0.5 else ZERO


def share(tree: Product, channels: int = ASKED) -> float:
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

    found: list[float] = []
    for models, near in _MODELS:
        found += [model() for _ in range(models - len(found))]
        if abs(median(found) - 0.5) > near:
            break
    return median(found)


@dataclass(frozen=True)
class _Path:
    """By how much a product has risen after some times, from 0 on. It never falls, since df/dt = |∂f/∂x|²; where steps
    of the flow make it fall, which are long for a steep one, it is what it was."""

    times: tuple[float, ...]
    rises: tuple[float, ...]

    @classmethod
    def of(cls, flow: Flow, x: Sequence[float], enough: float, longest: float) -> _Path:
        """Until it has risen enough, or for so long."""
        times, rises = [0.0], [0.0]
        try:
            first = flow.at(x)[0]
            for place in flow.follow(x):
                rise = max(place.value - first, rises[-1])
                if rise >= enough:
                    early = times[-1]
                    times.append(early + (place.time - early) * (enough - rises[-1]) / (rise - rises[-1]))
                    rises.append(enough)
                    break
                times.append(place.time)
                rises.append(rise)
                if place.time > longest:
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
    latest = alone if alone < inf else max(path.times[-1] for path in paths)
    arrival = bisected(lambda time: sum(path.rise(time) for path in paths) >= enough, 0.0, latest)
    rises = [path.rise(arrival) for path in paths]
    return max(rises) / sum(rises) if sum(rises) >= 0.99 * enough else 0.0
