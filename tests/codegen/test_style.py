"""Emitted files read as if a person had written them: ruff (rules and format) and mypy --strict have nothing to say."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from widthwise.codegen.render import render
from widthwise.codegen.request import Request

ROOT = Path(__file__).parents[2]
REQUESTS = {
    "tied": Request("gated_deltanet", tied=True),
    "absorbed": Request("gated_deltanet", gauge="absorbed", options=("value_groups=on",)),
    "ntk": Request("transformer", optimizer="sgd", parametrization="ntk", options=("qk_norm=on",)),
    "mamba": Request("mamba2", optimizer="muon", scaling="heads-fixed"),
    "gla": Request("gated_linear_attention", gauge="absorbed"),
    "long": Request("mlp", fix=tuple(f"{role}.lr=1/2" for role in ("input", "hidden", "output", "input_bias"))),
    "perceptron": Request("mlp", optimizer="lion", options=("depth=3",)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("emitted")
    shutil.copy(ROOT / "pyproject.toml", made)
    for name, request in REQUESTS.items():
        (made / f"{name}.py").write_text(render(request), encoding="utf-8")
    return made


@pytest.mark.parametrize("command", [["ruff", "check"], ["ruff", "format", "--check", "--diff"], ["mypy", "--strict"]])
def test_linters_have_nothing_to_say(folder: Path, command: list[str]) -> None:
    tool = shutil.which(command[0], path=str(Path(sys.executable).parent)) or shutil.which(command[0])
    if tool is None:
        pytest.skip(f"{command[0]} is not installed")
    files = [f"{name}.py" for name in REQUESTS]
    result = subprocess.run([tool, *command[1:], *files], cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_rendering_is_deterministic() -> None:
    code = "from widthwise.codegen.render import render; from widthwise.codegen.request import Request;"
    code += "print(render(Request('gated_deltanet', optimizer='sgd')), end='')"
    texts = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": str(seed), "PYTHONPATH": str(ROOT / "src"), "PYTHONIOENCODING": "utf-8"},
            capture_output=True,
            check=True,
        ).stdout
        for seed in (1, 2, 3)
    }
    assert len(texts) == 1


def test_a_parametrization_imports_torch_alone() -> None:
    for request in REQUESTS.values():
        nodes = list(ast.walk(ast.parse(render(request))))
        named = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        named |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
        assert {name.partition(".")[0] for name in named} - sys.stdlib_module_names == {"torch"}
