"""Whole tables as text a person can review. Each carries its command; ``widthwise check --write tests/golden`` brings
them up to date: read the difference."""

from pathlib import Path

import pytest

from widthwise.codegen.drift import check_file

GOLDEN = sorted((Path(__file__).parents[1] / "golden").iterdir())


@pytest.mark.parametrize("path", GOLDEN, ids=[path.stem for path in GOLDEN])
def test_golden(path: Path) -> None:
    drift = check_file(path)
    assert drift is None, f"{drift.what}\n{drift.diff}"
