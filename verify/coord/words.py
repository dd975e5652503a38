"""Results in words: what a failed prediction means, and where to look."""

from __future__ import annotations

from widthwise.verify.coord.stats import Result


def finding(result: Result) -> str:
    """One sentence or two on a prediction that failed."""
    measured, derived = _power(result.slope.value), _power(result.slope.value - result.off)
    excess = _power(abs(result.off))
    large = "large" if result.off > 0 else "small"
    role, _, tensor = result.name.partition(" in ")
    when = "at the first step" if result.step == 1 else f"after {result.step} steps"
    if result.kind == "weight":
        return f"{role} is drawn as {measured} where {derived} was derived: its init std is {excess} too {large}."
    if result.kind == "forward":
        return (
            f"{role} is {measured} at initialization where {derived} was derived: an init std or a multiplier on the "
            f"way to it is {excess} too {large}. Look at the first such tensor."
        )
    if result.kind in ("gradient", "weight gradient"):
        return (
            f"the gradient of {role} is {measured} where {derived} was derived: an init std or a multiplier between it "
            f"and the loss is {excess} too {large}. Look at the last such tensor."
        )
    if result.kind == "own step":
        what = f"what its steps do in {tensor}" if tensor else "its own change"
        return (
            f"{role}: {what} goes as {measured} {when} where {derived} was derived: its learning rate is {excess} too "
            f"{large}, or its gradient is not what the rule takes it for."
        )
    if result.kind == "step":
        return (
            f"{role} steps as {measured} where {derived} was derived: its learning rate is {excess} too {large}, or "
            "eps is in the way."
        )
    if result.kind == "upstream":
        return (
            f"{role}'s contribution to {tensor} grows as {measured} {when}, where {derived} was the bound: its "
            "operator norm lets changes from upstream through. Its init std or multiplier is too large, or what it "
            "reads moves too much."
        )
    return f"the change of {role} goes as {measured} {when} where {derived} was the bound."


def _power(exponent: float) -> str:
    return f"n^{exponent:.2f}"
