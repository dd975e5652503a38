"""Each model is traced once."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

torch = pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).parent))  # for traced_models.py and traced_descriptions.py

import traced_models  # noqa: E402

from widthwise.codegen.render import render  # noqa: E402
from widthwise.codegen.request import Request  # noqa: E402
from widthwise.derive.graph_toml import write_graph  # noqa: E402
from widthwise.verify.trace import Traced, trace  # noqa: E402

TRANSFORMERS = ("llama", "gpt2", "qwen3", "mamba2", "qwen3_next")


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


@pytest.fixture
def generated(traced, tmp_path: Path):
    """The imported module of a traced model, and the class at another width than any that was traced."""

    def made(name: str, optimizer: str = "adamw", gauge: str = "absorbed") -> tuple[ModuleType, torch.nn.Module]:
        file = tmp_path / f"{name}.toml"
        file.write_text(write_graph(traced(name).graph), encoding="utf-8")
        source = tmp_path / f"generated_{name}.py"
        source.write_text(render(Request(str(file), optimizer=optimizer, gauge=gauge)), encoding="utf-8")
        spec = importlib.util.spec_from_file_location(source.stem, source)
        module = importlib.util.module_from_spec(spec)
        sys.modules[source.stem] = module
        spec.loader.exec_module(module)
        return module, getattr(traced_models, name)(traced_models.ELSEWHERE)[0]

    return made
