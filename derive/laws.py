"""Base laws: how a parameter is drawn at the base width, before its rule scales it.

The engine asks a law whether it is symmetric (the ground of coherence by sign flips) and, where products of factors are
followed, where a factor begins; whoever runs or generates a model reads the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import expm1, inf, log
from statistics import fmean, pstdev

from widthwise.derive.errors import DeriveError, unknown_name


@dataclass(frozen=True)
class Law:
    """``name`` says which law, ``low`` and ``high`` its range where it has one.

    normal: N(0, 1/fan_in at the base width). unit_normal: N(0, 1). taps: U(±1/√taps), PyTorch's default for a depthwise
    convolution. ones, zeros: constants. log_uniform: log U(low, high). inverse_softplus: the z with softplus(z)
    log-uniform in (low, high).

    Raises:
        DeriveError: for another law, or a range that has none.
    """

    name: str
    symmetric: bool = False
    low: float = 0.0
    high: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in _PLAIN + _RANGED:
            raise unknown_name("law", self.name, list(_PLAIN + _RANGED))
        if self.name in _RANGED and not 0 < self.low < self.high < inf:
            raise DeriveError(
                f"a {self.name} law from {self.low:g} to {self.high:g} is none",
                cure="give a positive low and a larger, finite high",
            )


_PLAIN, _RANGED = ("normal", "unit_normal", "taps", "ones", "zeros"), ("log_uniform", "inverse_softplus")


NORMAL = Law("normal", symmetric=True)
UNIT_NORMAL = Law("unit_normal", symmetric=True)
TAPS = Law("taps", symmetric=True)
ONES = Law("ones")
ZEROS = Law("zeros")


def log_uniform(low: float, high: float) -> Law:
    """The logarithm of a uniform number, as decay rates have it."""
    return Law("log_uniform", low=low, high=high)


def inverse_softplus(low: float, high: float) -> Law:
    """What softplus turns into a log-uniform number, as time-step biases have it."""
    return Law("inverse_softplus", low=low, high=high)


DECAY_RATE = log_uniform(1.0, 16.0)
TIME_STEP = inverse_softplus(1e-3, 1e-1)

SYMMETRIC = {law.name: law.symmetric for law in (NORMAL, UNIT_NORMAL, TAPS, ONES, ZEROS, DECAY_RATE, TIME_STEP)}
"""Every law by name: whether it is symmetric, and so has a standard deviation."""


_BEGINS = {
    NORMAL.name: (0.0, 1.0),
    UNIT_NORMAL.name: (0.0, 1.0),
    TAPS.name: (0.0, 3**-0.5),
    ONES.name: (1.0, 0.0),
    ZEROS.name: (0.0, 0.0),
}


def begins(law: Law) -> tuple[float, float]:
    """(mean, standard deviation) of one entry of what a parameter multiplies by, at the base width.

    A weight's entry is what it makes of a unit input; taps count together, as one factor of their channel.
    """
    if law.name in _BEGINS:
        return _BEGINS[law.name]
    evenly = [(index + 0.5) / 200 for index in range(200)]
    if law.name == DECAY_RATE.name:
        drawn = [log(law.low + (law.high - law.low) * each) for each in evenly]
    else:
        softened = [law.low * (law.high / law.low) ** each for each in evenly]
        drawn = [each + log(-expm1(-each)) for each in softened]
    return fmean(drawn), pstdev(drawn)
