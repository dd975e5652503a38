"""Base laws: how a parameter is drawn at the base width, before its rule scales it.

The engine asks a law one thing only, whether it is symmetric (the ground of coherence by sign flips); whoever runs or
generates a model reads the rest.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Law:
    """``name`` says which law, ``low`` and ``high`` its range where it has one.

    normal: N(0, 1/fan_in at the base width). unit_normal: N(0, 1). taps: U(±1/√taps), PyTorch's default for a depthwise
    convolution. ones, zeros: constants. log_uniform: log U(low, high). inverse_softplus: the z with softplus(z)
    log-uniform in (low, high).
    """

    name: str
    symmetric: bool = False
    low: float = 0.0
    high: float = 0.0


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
