"""Optimum, shift, regret and sensitivity of curves that are known."""

import math
from typing import Any

import pytest

pytest.importorskip("torch")
from widthwise.verify.transfer import report
from widthwise.verify.transfer.metrics import curves, transfers


def entries(width: int, optimum: float, floor: float, *, name: str = "ours", seeds: int = 1) -> list[dict[str, Any]]:
    """A parabola in log2 of the learning rate, half an octave a point."""
    return [
        {
            "parametrization": name,
            "width": width,
            "sizes": {"width": 64},
            "lr": 2.0 ** (step / 2),
            "seed": seed,
            "loss": floor + 0.1 * (step / 2 - optimum) ** 2 + 0.01 * seed + 0.003 * seed * (step / 2 - optimum),
            "diverged": None,
        }
        for step in range(-16, 1)
        for seed in range(seeds)
    ]


def test_the_optimum_is_found_between_points() -> None:
    (curve,) = curves(entries(64, -4.2, 2.0))
    assert curve.optimum == pytest.approx(-4.2)
    assert not curve.at_edge


def test_noise_moves_the_optimum_little() -> None:
    rows = entries(64, -4.2, 2.0)
    for step, row in enumerate(rows):
        row["loss"] += 0.004 * (-1) ** step
    (curve,) = curves(rows)
    assert curve.optimum == pytest.approx(-4.2, abs=0.05)


def test_an_optimum_next_to_divergence_is_a_point_of_the_grid() -> None:
    rows = entries(64, -4.2, 2.0)
    for row in rows:
        if row["lr"] > 2**-5:
            row |= {"diverged": 3, "loss": None}
    (curve,) = curves(rows)
    assert curve.optimum == -5


def test_shift_and_regret_are_those_of_transferring_from_the_base() -> None:
    found = {each.width: each for each in transfers(entries(64, -4.0, 2.0) + entries(256, -5.5, 1.8))}
    assert (found[64].shift, found[64].regret) == (0, 0)
    assert found[256].shift == pytest.approx(-1.5)
    assert found[256].regret == pytest.approx(0.1 * 1.5**2)
    assert found[256].best_lr == 2**-5.5
    assert found[64].sensitivity == pytest.approx(0.1)


def test_a_flat_curve_says_how_far_it_is_flat() -> None:
    found = {each.width: each for each in transfers(entries(64, -4.0, 2.0) + entries(256, -5.25, 1.8))}
    # half an octave off the parabola is 0.025 up, of which 0.01 is two fifths; at -5.25 two points are lowest alike
    assert found[64].flat == pytest.approx((-0.2, 0.2))
    low, high = found[256].flat
    assert (low, high) == pytest.approx((-1.6, -0.9))
    assert low < found[256].shift < high
    row = next(row for row in report.rows(entries(64, -4.0, 2.0)))
    assert row[5] == "-0.20 to +0.20"


def test_how_far_a_curve_is_flat_past_the_end_of_its_grid_is_not_known() -> None:
    found = {each.width: each for each in transfers(entries(64, -4.0, 2.0) + entries(256, 0.1, 1.8))}
    assert found[256].flat == (pytest.approx(4 - 0.5 * 2 / 7), math.inf)  # from 0.001 to 0.036, of which 0.01 is 2/7
    assert report.rows(entries(256, 0.1, 1.8))[0][5].endswith(" to ·")


def test_errors_come_from_differences_seed_by_seed() -> None:
    found = {each.width: each for each in transfers(entries(64, -4, 2, seeds=3) + entries(256, -5, 2, seeds=3))}
    assert found[256].shift_error == pytest.approx(0, abs=1e-9)  # every seed's optima lie as far apart
    assert found[256].regret_error == pytest.approx(0.003 / 3**0.5)  # what seeds share is no error of the regret
    assert (found[64].regret_error, found[64].shift_error) == (0, 0)


def test_a_seed_with_few_learning_rates_has_no_optimum_of_its_own() -> None:
    rows = entries(64, -4, 2, seeds=3) + entries(256, -5, 2, seeds=3)
    few = [row for row in rows if row["seed"] != 2 or row["width"] == 64 or row["lr"] in (2**-8, 2**-7.5)]
    assert {each.width: each for each in transfers(few)}[256].shift_error == pytest.approx(0, abs=1e-9)


def test_a_seed_with_few_learning_rates_does_not_bend_the_curve() -> None:
    rows = entries(64, -4, 2, seeds=2)
    for row in rows:
        row["loss"] += 0.5 * row["seed"] - 0.003 * row["seed"] * (math.log2(row["lr"]) + 4)  # a worse seed throughout
    whole = curves(rows)[0]
    few = curves([row for row in rows if row["seed"] == 0 or abs(math.log2(row["lr"]) + 4) < 0.9])[0]
    assert few.losses == pytest.approx(whole.losses)
    assert few.optimum == pytest.approx(-4)
    assert few.rise(2.0**-4.5) == pytest.approx(whole.rise(2.0**-4.5), abs=1e-9)
    assert math.isnan(few.rise(2.0**-6)[1])  # where there is one seed


def test_runs_at_the_base_width_are_everyones() -> None:
    rows = entries(64, -4.0, 2.0, seeds=2)
    other = [row | {"parametrization": "theirs"} for row in rows if row["seed"] == 1]
    mixed = [row for row in rows if row["seed"] == 0] + other + entries(256, -4.0, 1.8, name="theirs")
    assert all(curve.by_seed.keys() == {0, 1} for curve in curves(mixed) if curve.width == 64)
    assert [(curve.parametrization, curve.width) for curve in curves(mixed)] == [
        ("ours", 64),
        ("theirs", 64),
        ("theirs", 256),
    ]


def test_a_seed_that_is_far_off_at_one_rate_does_not_lift_the_rates_it_lacks() -> None:
    rows = [row for row in entries(64, -4.0, 2.0, seeds=3) if row["lr"] >= 2**-6]
    kept = [row for row in rows if row["seed"] == 0 or row["lr"] != 2**-3.5]
    next(row for row in kept if row["seed"] == 2 and row["lr"] == 1.0)["loss"] += 3.0
    (curve,) = curves(kept)
    assert curve.at(2**-3.5) == pytest.approx(curves(rows)[0].at(2**-3.5), abs=0.003)


@pytest.mark.parametrize(
    "own", [{"request": {"options": ["qk_scale=d_k^-1/2"]}}, {"lr_multipliers": {"o_proj": 0.5, "v_proj": 2.0}}]
)
def test_another_model_has_a_base_of_its_own(own: dict[str, Any]) -> None:
    other = entries(64, -3, 2, name="other") + entries(256, -3, 2, name="other")
    turned = {
        key: dict(reversed(value.items())) for key, value in own.items()
    }  # the order of what is said says nothing
    rows = entries(64, -4, 2) + [row | own for row in other]
    rows += [row | turned for row in entries(256, -2, 2, name="third")]
    found = {(each.parametrization, each.width): each.shift for each in transfers(rows)}
    assert found["other", 256] == pytest.approx(0)
    assert found["third", 256] == pytest.approx(1)


def test_narrower_models_than_the_base_and_a_base_without_runs() -> None:
    wider = entries(256, -5, 1.8)
    found = {each.width: each for each in transfers(entries(32, -2, 2.2) + entries(64, -4, 2) + wider)}
    assert {width: each.shift for width, each in found.items()} == {32: pytest.approx(2), 64: 0, 256: pytest.approx(-1)}
    assert found[256].regret == pytest.approx(0.1)
    (alone,) = transfers(wider)
    assert math.isnan(alone.shift)
    assert math.isnan(alone.regret)
    assert report.rows(wider)[0][4:7] == ("·", "· to ·", "·")


def test_regret_past_the_end_of_a_grid_is_a_bound() -> None:
    rows = entries(64, -1.0, 2.0) + [row for row in entries(256, -5.0, 1.8) if row["lr"] < 2**-2.9]
    found = {each.width: each for each in transfers(rows)}
    assert (found[64].beyond, found[256].beyond) == (False, True)
    assert found[256].regret == pytest.approx(0.1 * 2**2)  # of 0.1 · 4², at the end two octaves off
    assert "| > 0.4000 |" in report.markdown(rows)


def test_divergence_counts_as_an_infinite_loss() -> None:
    rows = entries(64, -4.0, 2.0) + entries(256, -6.0, 1.8)
    for row in rows:
        if row["width"] == 256 and row["lr"] >= 2**-4:
            row |= {"diverged": 3, "loss": None}
    found = {each.width: each for each in transfers(rows)}
    assert found[256].regret == math.inf
    assert found[256].diverged == 9


def test_an_optimum_at_the_end_of_the_grid_is_marked() -> None:
    (found,) = transfers(entries(64, 3.0, 2.0))
    assert found.at_edge


def test_parametrizations_are_kept_apart() -> None:
    """But for the base width, where they are the same."""
    found = transfers(entries(64, -4, 2) + entries(256, -4, 2) + entries(256, -6, 2, name="standard"))
    assert [(each.parametrization, each.width, round(each.shift, 6)) for each in found] == [
        ("ours", 64, 0),
        ("ours", 256, 0),
        ("standard", 64, 0),
        ("standard", 256, -2),
    ]
