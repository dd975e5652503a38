"""From sizes to verdicts: slopes with standard errors, held against predicted exponents."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import exp, inf, log, nan, sqrt
from statistics import fmean, stdev
from typing import Any, Literal

from widthwise.verify.coord.predict import Prediction
from widthwise.verify.coord.run import SHORT, Measurements

Verdict = Literal["ok", "drift", "unresolved", "fail"]

TOLERANCE = 0.1
BETWEEN = 0.25  # halfway to the next exponent, since those of rules differ by halves
MEANING: dict[Verdict, str] = {
    "ok": f"within {TOLERANCE} or two standard errors of the prediction",
    "drift": f"further off than that, and still nearest to the prediction (within {BETWEEN}): finite-size effects",
    "unresolved": "the standard error is too large to tell the prediction from its neighbours at ±1/2",
    "fail": f"further than {BETWEEN} from the prediction, even less two standard errors: another exponent",
}


@dataclass(frozen=True)
class Slope:
    """The least-squares slope of log size against log width with its standard error over seeds, and the slope
    between the two largest widths with its own."""

    value: float
    error: float
    local: float
    local_error: float


@dataclass(frozen=True)
class Result:
    """One prediction held against its measurement. ``sizes`` are geometric means over seeds, by width."""

    kind: str
    name: str
    step: int
    statistic: str
    predicted: float
    bound: bool
    tolerated: float | None
    slope: Slope
    verdict: Verdict
    sizes: tuple[float, ...]
    least: float | None = None

    @property
    def off(self) -> float:
        """How far the slope is from the prediction; below a bound it is nowhere off."""
        return _off(self.slope.value, self.predicted, self.bound, self.least)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def fit(widths: Sequence[int], rows: Sequence[Sequence[float]]) -> Slope:
    """The slope of sizes [seed][width]. One seed alone has an infinite standard error."""
    x = [log(width) for width in widths]
    middle = fmean(x)
    spread = sum((each - middle) ** 2 for each in x)
    logs = [[log(size) for size in row] for row in rows]
    slopes = [sum((a - middle) * b for a, b in zip(x, row, strict=True)) / spread for row in logs]
    last = [(row[-1] - row[-2]) / (x[-1] - x[-2]) for row in logs]
    return Slope(fmean(slopes), _error(slopes), fmean(last), _error(last))


def _error(values: Sequence[float]) -> float:
    return stdev(values) / sqrt(len(values)) if len(values) > 1 else inf


def _off(value: float, predicted: float, bound: bool, least: float | None) -> float:
    """How far a slope is from its prediction: from the nearer end, where that is a range; only above it, of a bound."""
    low = -inf if bound else predicted if least is None else least
    return value - min(max(value, low), predicted)


def judge(slope: Slope, predicted: float, bound: bool = False, least: float | None = None) -> Verdict:
    """The verdict on one slope; of a bound, only what exceeds it counts."""
    off = abs(_off(slope.value, predicted, bound, least))
    if off - 2 * slope.error > BETWEEN:
        return "fail"
    if off > BETWEEN or 2 * slope.error > BETWEEN:
        return "unresolved"
    return "ok" if off <= max(TOLERANCE, 2 * slope.error) else "drift"


def results(
    found: Measurements,
    predicted: Iterable[Prediction],
    steps: int,
    *,
    follows_gradient: bool,
    slowed: Mapping[str, Sequence[float]] | None = None,
) -> tuple[Result, ...]:
    """Every prediction that was measured: sizes and gradients before the first step, changes after the first and the
    last. ``follows_gradient``: the optimizer's step is as heavy-tailed as the gradient (SGD). ``slowed`` has, by role
    and width, what the number of channels leaves of a learning rate: no power of n, and taken out of its steps."""
    made = []
    for each in predicted:
        last = {1, steps} if each.kind in ("own step", "upstream", "change") else {1 if each.kind == "step" else 0}
        for step in sorted(last):
            statistic = _statistic(found, each, follows_gradient)
            rows = found.rows(each.kind, each.name, step, statistic)
            if each.kind == "step" and follows_gradient:
                beside = found.rows("weight gradient", each.name, 0, statistic)
                rows = [
                    [a / b if b else 0.0 for a, b in zip(*both, strict=True)] for both in zip(rows, beside, strict=True)
                ]
            if each.crowded is not None and slowed is not None:
                by = slowed[each.crowded.role]
                rows = [[size / factor for size, factor in zip(row, by, strict=True)] for row in rows]
            if all(size == 0.0 for row in rows for size in row):
                continue  # not measured, or a change that there is not: no row of the embedding is upstream of it
            made.append(_result(found.widths, each, step, statistic, [row for row in rows if min(row) > 0.0]))
    return tuple(made)


def _result(
    widths: Sequence[int], each: Prediction, step: int, statistic: str, rows: Sequence[Sequence[float]]
) -> Result:
    slope = fit(widths, rows) if rows else Slope(nan, inf, nan, inf)
    sizes = tuple(exp(fmean(map(log, column))) for column in zip(*rows, strict=True))
    verdict = judge(slope, each.exponent, each.bound, each.least) if rows else "unresolved"
    found = each.exponent, each.bound, each.tolerated, slope, verdict, sizes, each.least
    return Result(each.kind, each.name, step, statistic, *found)


def _statistic(found: Measurements, each: Prediction, follows_gradient: bool) -> str:
    """How a quantity's size is taken. Short rows (one entry a head) are taken entry by entry, because the rms of a few
    entries of a wide distribution is small on average, and less so as they grow in number. Gradients are taken by
    their typical row, and so are changes that inherit their heavy tails."""
    if each.kind == "step":
        return "rms"  # over that of the gradient where it follows it: one and the same factor everywhere
    if found.shortest.get((each.kind, each.name), SHORT) < SHORT:
        return "entries"
    heavy = each.kind in ("gradient", "weight gradient") or (each.kind != "forward" and follows_gradient)
    return "typical" if heavy and each.kind != "weight" else "rms"
