"""Slopes and verdicts, on numbers whose slope is known."""

import math
import random

import pytest

from widthwise.derive import DeriveError
from widthwise.verify.coord.check import check_widths
from widthwise.verify.coord.predict import Prediction
from widthwise.verify.coord.run import Measurements
from widthwise.verify.coord.stats import Slope, fit, judge, results

WIDTHS = (64, 128, 256, 512)


def rows(slope: float, noise: float, seeds: int = 200) -> list[list[float]]:
    generator = random.Random(1)
    return [[width**slope * math.exp(generator.gauss(0, noise)) for width in WIDTHS] for _ in range(seeds)]


def test_a_power_has_its_slope_and_no_error() -> None:
    found = fit(WIDTHS, rows(-0.5, 0.0, 3))
    assert found.value == pytest.approx(-0.5)
    assert found.local == pytest.approx(-0.5)
    assert found.error == pytest.approx(0, abs=1e-12)


def test_the_error_is_that_of_least_squares() -> None:
    found = fit(WIDTHS, rows(1.0, 0.3))
    spread = sum((math.log(width) - sum(map(math.log, WIDTHS)) / 4) ** 2 for width in WIDTHS)
    assert found.error == pytest.approx(0.3 / math.sqrt(spread * 200), rel=0.15)
    assert abs(found.value - 1.0) < 3 * found.error


def test_one_seed_resolves_nothing() -> None:
    assert fit(WIDTHS, rows(0.0, 0.1, 1)).error == math.inf
    assert judge(Slope(0.0, math.inf, 0.0, math.inf), 0.0) == "unresolved"


@pytest.mark.parametrize(
    ("measured", "error", "verdict"),
    [
        (0.09, 0.01, "ok"),
        (0.20, 0.11, "ok"),
        (0.20, 0.02, "drift"),
        (-0.20, 0.02, "drift"),
        (0.5, 0.05, "fail"),
        (-0.5, 0.05, "fail"),
        (0.5, 0.2, "unresolved"),
        (0.0, 0.2, "unresolved"),
        (0.3, 0.04, "unresolved"),
        (2.0, 0.5, "fail"),
    ],
)
def test_verdicts(measured: float, error: float, verdict: str) -> None:
    assert judge(Slope(measured, error, measured, error), 0.0) == verdict


@pytest.mark.parametrize(
    ("measured", "verdict"),
    [(0.05, "ok"), (-0.5, "ok"), (-1.05, "ok"), (0.2, "drift"), (-1.2, "drift"), (-1.5, "fail")],
)
def test_what_training_raises_is_a_range(measured: float, verdict: str) -> None:
    assert judge(Slope(measured, 0.01, measured, 0.01), 0.0, least=-1.0) == verdict


def test_a_bound_is_broken_from_above_alone() -> None:
    below, above = Slope(-0.6, 0.01, 0, 0), Slope(0.6, 0.01, 0, 0)
    assert judge(below, 0.0, bound=True) == "ok"
    assert judge(above, 0.0, bound=True) == "fail"


def test_sgd_steps_are_taken_over_their_gradient() -> None:
    found = Measurements(WIDTHS)
    for width in WIDTHS:
        found.note("step", "A_log", 1, 0, rms=width**0.25)
        found.note("weight gradient", "A_log", 0, 0, rms=width**-0.25)
    (result,) = results(found, [Prediction("step", "A_log", 0.5)], 1, follows_gradient=True)
    assert result.slope.value == pytest.approx(0.5)


def test_short_rows_are_taken_entry_by_entry() -> None:
    found = Measurements(WIDTHS)
    found.shortest["gradient", "z_a"] = 4
    for width in WIDTHS:
        found.note("gradient", "z_a", 0, 0, entries=width**-0.5, typical=1.0)
    (result,) = results(found, [Prediction("gradient", "z_a", -0.5)], 1, follows_gradient=False)
    assert result.statistic == "entries"
    assert result.slope.value == pytest.approx(-0.5)


def test_incomplete_seeds_do_not_count() -> None:
    found = Measurements(WIDTHS)
    found.note("forward", "loss", 0, 0, value=1.0)
    assert found.whole_seeds == 0


@pytest.mark.parametrize(
    ("widths", "why"), [((64, 64, 64), "differ"), ((64, 128), "cannot tell"), ((64, 70, 80), "close")]
)
def test_widths_that_tell_nothing_are_refused(widths: tuple[int, ...], why: str) -> None:
    with pytest.raises(DeriveError, match=why):
        check_widths(widths)
