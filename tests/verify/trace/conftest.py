"""Each model is traced once."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).parent))  # for traced_models.py and traced_descriptions.py

import traced_models

from widthwise.verify.trace import Traced, trace

TRANSFORMERS = ("llama", "qwen3", "mamba2", "qwen3_next")


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch, _made: dict[str, Traced]) -> Callable[[str], Traced]:
    """``traced("llama")``: that model of traced_models.py."""
    # transformers would take FLA's Triton kernels where FLA is installed, and those need a GPU
    monkeypatch.setitem(sys.modules, "fla", None)

    def made(name: str) -> Traced:
        if name in TRANSFORMERS:
            pytest.importorskip("transformers")
        if name not in _made:
            _made[name] = trace(getattr(traced_models, name), traced_models.WIDTHS, name)
        return _made[name]

    return made


@pytest.fixture(scope="session")
def _made() -> dict[str, Traced]:
    return {}
