"""Where something begins to hold."""

from __future__ import annotations

from collections.abc import Callable

_HALVINGS = 40


def bisected(holds: Callable[[float], bool], low: float, high: float) -> float:
    """Where something begins to hold that does not at the low end and does at the high one."""
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
