"""Generated modules as a user has them: written to a file and imported."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from widthwise.codegen.render import render
from widthwise.codegen.request import Request

sys.path.insert(0, str(Path(__file__).parent))  # for small_models.py
if importlib.util.find_spec("torch") is None:  # these are about what runs; the rest is about text
    collect_ignore = ["small_models.py", "test_model.py", "test_odd_models.py"]


@pytest.fixture(scope="session")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ModuleType]:
    """``generated("mlp", optimizer="sgd")``: the imported module of that request, made once."""
    made: dict[tuple[Request, str], ModuleType] = {}

    def module(architecture: str, emit: str = "parametrization", **request: object) -> ModuleType:
        asked = Request(architecture, **request)  # type: ignore[arg-type]
        if (asked, emit) not in made:
            file = tmp_path_factory.mktemp("generated") / f"generated_{len(made)}.py"
            file.write_text(render(asked, emit), encoding="utf-8")
            spec = importlib.util.spec_from_file_location(file.stem, file)
            assert spec is not None
            assert spec.loader is not None
            loaded = importlib.util.module_from_spec(spec)
            sys.modules[file.stem] = loaded  # dataclasses look their module up
            spec.loader.exec_module(loaded)
            made[asked, emit] = loaded
        return made[asked, emit]

    return module
