"""What docs/results/transfer says of the rules that are derived today: the promise, held to what was measured."""

import math
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

pytest.importorskip("torch")
from widthwise.codegen.request import Request
from widthwise.verify.transfer.metrics import curves, standard_error, transfers
from widthwise.verify.transfer.results import Results
from widthwise.verify.transfer.settings import check_comparable

MEASURED = Path(__file__).parents[3] / "docs" / "results" / "transfer"
PUBLISHED = "liu-gu-2026"
WIDTHS = (512, 1024, 2048)  # 4, 8 and 16 times the base width
# With heads fixed, runs four times as long are not among these: their optima are above the base's by half an octave
# (heads-fixed-sgd-long, 4×) and more (heads-fixed-sgd-torch), as the page says.
PROMISED = [
    ("heads-fixed-adamw", "widthwise"),
    ("head-dim-fixed-adamw", "widthwise"),
    ("heads-fixed-adamw-eps", "widthwise"),
    ("head-dim-fixed-adamw-eps", "widthwise"),
    ("heads-fixed-sgd-eps", "carrying-channel"),
    ("head-dim-fixed-sgd-eps", "carrying-channel"),
]


def entries(name: str) -> list[dict[str, Any]]:
    return list(Results(MEASURED / f"{name}.jsonl").load().values())


@pytest.mark.parametrize("file", sorted(MEASURED.glob("*.jsonl")), ids=lambda file: file.stem)
def test_no_file_mixes_runs_of_several_settings(file: Path) -> None:
    check_comparable(entries(file.stem), file)


@pytest.mark.parametrize(("name", "parametrization"), PROMISED)
def test_what_was_run_is_what_is_derived_today(name: str, parametrization: str) -> None:
    found = [each for each in entries(name) if each["parametrization"] == parametrization and each["width"] in WIDTHS]
    assert len({repr(sorted(each["request"].items())) for each in found}) == 1
    request = found[0]["request"]
    tuples = {key: tuple(value) if isinstance(value, list) else value for key, value in request.items()}
    assert (request["preset"], request["fix"]) == (None, [])  # by no hand
    assert {each["rules"] for each in found} == {Request(**tuples).table().knobs_hash}


@pytest.mark.parametrize(("name", "parametrization"), PROMISED)
def test_the_optimum_stays_and_the_transferred_rate_costs_next_to_nothing(name: str, parametrization: str) -> None:
    found = {each.width: each for each in transfers(entries(name)) if each.parametrization == parametrization}
    for width in WIDTHS:
        assert abs(found[width].shift) <= 0.5
        assert not found[width].beyond
        assert found[width].regret <= 0.01
        assert not found[width].at_edge


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("heads-fixed-adamw", "widthwise"),
        ("heads-fixed-sgd-eps", "carrying-channel"),
        ("heads-fixed-sgd-long", "carrying-channel"),
    ],
)
def test_nowhere_worse_than_the_published_rules(name: str, ours: str) -> None:
    """In what transferring costs and in what it ends at, but for twice the standard error over seeds, where these are
    several."""
    rows = entries(name)
    found = {(each.parametrization, each.width): each for each in transfers(rows)}
    by_seed = {(each.parametrization, each.width): each.by_seed for each in curves(rows)}
    tuned = {which: found[which, 128].best_lr for which in (ours, PUBLISHED)}
    for width in WIDTHS:
        mine, theirs = (found[which, width] for which in (ours, PUBLISHED))
        assert mine.regret <= theirs.regret + 2 * math.hypot(known(mine.regret_error), known(theirs.regret_error))
        here, there = (
            {seed: row[lr] for seed, row in by_seed[which, width].items() if lr in row} for which, lr in tuned.items()
        )
        differences = [here[seed] - there[seed] for seed in sorted(here.keys() & there.keys())]
        assert mean(differences) <= 2 * known(standard_error(differences))


def known(error: float) -> float:
    """A standard error, or 0 of a single seed."""
    return 0.0 if math.isnan(error) else error


@pytest.mark.parametrize("name", ["heads-fixed-adamw", "head-dim-fixed-adamw"])
def test_standard_parametrization_shows_the_contrast(name: str) -> None:
    found = [each for each in transfers(entries(name)) if each.parametrization == "standard"]
    by_width = {each.width: each.shift for each in found}
    assert by_width[512] < -1
    assert by_width[2048] < -3
