"""The demo, in small: it generates, trains both parametrizations at both widths, and says what came of it."""

import io
from pathlib import Path

import pytest
from rich.console import Console

pytest.importorskip("torch")
from widthwise.derive.errors import DeriveError
from widthwise.verify import demo


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in {"BASE": 16, "WIDE": 32, "BATCH": 2, "LENGTH": 32}.items():
        monkeypatch.setattr(demo, name, value)
    path = tmp_path / "text"
    path.write_bytes(b"the quick brown fox jumps over the lazy dog; " * 2000)
    return path


def test_trains_and_reports(text: Path, tmp_path: Path) -> None:
    said = io.StringIO()
    runs = demo.demo(text, tmp_path / "out", 1.0, Console(file=said, width=100))
    assert [(run.width, run.parametrization) for run in runs] == [
        (width, name) for width in (16, 32) for name in ("standard", "derived")
    ]
    assert runs[0].loss == runs[1].loss  # the base width
    assert runs[2].loss != runs[3].loss
    assert all(run.loss < 5.4 for run in runs)  # log 256 = 5.5, before
    assert f"{runs[3].loss:.3f}" in said.getvalue()
    assert sorted(file.name for file in (tmp_path / "out").iterdir())[-1] == "gated_deltanet_parametrization.py"


def test_stopping_keeps_what_was_finished(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held_out, seen = demo.held_out, []

    def interrupted(*arguments: object) -> float:
        if seen:
            raise KeyboardInterrupt
        seen.append(1)
        return held_out(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(demo, "held_out", interrupted)
    said = io.StringIO()
    assert len(demo.demo(text, tmp_path / "out", 0.5, Console(file=said, width=100))) == 1
    assert "stopped; what was finished" in said.getvalue()


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_a_time_that_is_none(text: Path, tmp_path: Path, seconds: float) -> None:
    with pytest.raises(DeriveError, match="no time to train for"):
        demo.demo(text, tmp_path, seconds)


def test_a_folder_that_cannot_be(text: Path) -> None:
    with pytest.raises(DeriveError, match="cannot write"):
        demo.demo(text, text / "below", 1.0)
