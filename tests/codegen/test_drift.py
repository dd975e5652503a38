"""Files that carry their command are made again and compared; nothing that was edited passes."""

import os
import random
import shutil
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from widthwise.cli import cli
from widthwise.codegen import render as rendering
from widthwise.codegen.drift import check_file, generated_files
from widthwise.codegen.render import render
from widthwise.codegen.request import Request
from widthwise.codegen.tables import derived_text

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["check", *arguments])


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    return {
        "module.py": render(Request("mlp", optimizer="sgd")),
        "table.toml": derived_text(Request("mlp"), "toml"),
        "table.md": derived_text(Request("mlp"), "markdown"),
    }


@pytest.fixture
def folder(texts: dict[str, str], tmp_path: Path) -> Path:
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def test_what_was_made_passes(folder: Path) -> None:
    result = run(str(folder))
    assert result.exit_code == 0
    assert result.output == "3 generated files, 0 out of date\n"


@pytest.mark.parametrize("name", ["module.py", "table.toml", "table.md"])
def test_any_edit_of_one_character_fails(folder: Path, texts: dict[str, str], name: str) -> None:
    text, file = texts[name], folder / name
    header = [index for index in range(600) if index < len(text)]
    places = [*random.Random(0).sample(header, 40), *random.Random(1).sample(range(len(text)), 40), len(text) - 1]
    for place in places:
        for edited in (text[:place] + "~" + text[place + 1 :], text[:place] + text[place + 1 :]):
            if edited != text:
                file.write_text(edited, encoding="utf-8")
                assert file in generated_files([folder]), edited[:place][-80:]
                assert check_file(file) is not None, edited[:place][-80:]


@pytest.mark.parametrize("name", ["module.py", "table.toml", "table.md"])
@pytest.mark.parametrize("place", [3, 400, -40])
def test_a_byte_that_is_no_text_fails(folder: Path, name: str, place: int) -> None:
    file = folder / name
    content = bytearray(file.read_bytes())
    content[place] = 0xFF
    file.write_bytes(bytes(content))
    result = run(str(folder))
    assert result.exit_code == 1, result.output
    assert "3 generated files, 1 out of date" in result.output


def test_what_is_no_file_is_passed_over(folder: Path) -> None:
    os.mkfifo(folder / "pipe.py")
    (folder / "folder.py").mkdir()
    assert run(str(folder)).exit_code == 0


def test_a_header_with_two_commands_is_drift(folder: Path) -> None:
    file = folder / "table.toml"
    file.write_text("# widthwise derive mlp --format toml\n" + file.read_text(encoding="utf-8"), encoding="utf-8")
    assert "several commands" in run(str(file)).output


def test_drift_is_shown_and_repaired(folder: Path) -> None:
    file = folder / "module.py"
    file.write_text(file.read_text(encoding="utf-8").replace("lr=1,", "lr=2,", 1), encoding="utf-8")
    result = run(str(folder))
    assert result.exit_code == 1
    assert "-    Rule(" in result.output
    assert "lr=2" in result.output
    assert "1 out of date" in result.output
    assert run(str(folder), "--write").exit_code == 0
    assert run(str(folder)).exit_code == 0


def test_an_edited_template_is_drift(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = rendering._source
    monkeypatch.setattr(rendering, "_source", lambda name: source(name).replace("Every knob", "Each knob"))
    rendering._environment.cache_clear()
    rendering.template_hash.cache_clear()
    try:
        result = run(str(folder / "module.py"))
    finally:
        rendering._environment.cache_clear()
        rendering.template_hash.cache_clear()
    assert result.exit_code == 1
    assert "+Each knob" in result.output


def test_line_ends_count(folder: Path) -> None:
    file = folder / "module.py"
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    result = run(str(file))
    assert result.exit_code == 1
    assert "line ends" in result.output


def test_somebodys_own_architecture_is_imported_only_if_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_variant.py").write_text(
        "from widthwise.derive.architectures.mlp import mlp\n\n\ndef graph():\n    return mlp(bias=False)\n"
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_mup.py").write_text(render(Request("own_variant:graph")), encoding="utf-8")
    assert "pass --imports to let that code run" in run("own_mup.py").output
    assert run("own_mup.py", "--imports").exit_code == 0
    changed = (tmp_path / "own_variant.py").read_text().replace("bias=False", "bias=True")
    (tmp_path / "own_variant.py").write_text(changed)
    shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
    monkeypatch.delitem(sys.modules, "own_variant")
    result = run("own_mup.py", "--imports")
    assert result.exit_code == 1
    assert "input_bias" in result.output


@pytest.mark.parametrize("command", ["derive mlp --format toml; rm x", "generate", "generate mlp --emit nothing"])
def test_commands_that_make_no_sense_are_drift(folder: Path, command: str) -> None:
    file = folder / "module.py"
    text = file.read_text(encoding="utf-8").replace("widthwise generate mlp --optimizer sgd", f"widthwise {command}")
    file.write_text(text, encoding="utf-8")
    result = run(str(file))
    assert result.exit_code == 1
    assert result.exception is None or isinstance(result.exception, SystemExit)


def test_a_folder_without_generated_files_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "readme.md").write_text("# widthwise derive\n")
    for path in (tmp_path, tmp_path / "nothing"):
        result = run(str(path))
        assert result.exit_code == 2
        assert "error:" in result.output


def test_the_repositorys_own_files_are_up_to_date() -> None:
    folders = [ROOT / folder for folder in ("tests/golden", "generated", "kernels")]
    assert {file.name for file in generated_files(folders)} == {
        *(file.name for file in folders[0].iterdir()),
        *(file.name for file in folders[1].glob("*_*.py") if file.name != "__init__.py"),
        "model.py",
    }
    start = time.process_time()
    result = run(*map(str, folders))
    assert result.exit_code == 0, result.output
    assert time.process_time() - start < 3  # on any machine that does nothing else
