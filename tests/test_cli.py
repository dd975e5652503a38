"""The command line as a user meets it: output, exit codes, never a traceback."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from widthwise.cli import cli


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, list(arguments))


@pytest.mark.parametrize(
    "arguments",
    [
        ("derive", "gated_deltanet", "--optimizer", "adamw"),
        ("derive", "gated_deltanet", "--optimizer", "sgd", "--preset", "liu-gu-2026", "--tied"),
        ("derive", "gated_deltanet", "--optimizer", "sgd", "--regime", "asymptotic", "--assumptions"),
        ("derive", "transformer", "--parametrization", "standard", "--format", "markdown"),
        ("derive", "mlp", "--fix", "hidden.init_std=-1/2", "--format", "latex"),
        ("explain", "gated_deltanet", "a_proj", "--optimizer", "sgd"),
        ("list",),
    ],
)
def test_commands_of_the_readme(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert result.output.strip()


def test_json_on_stdout() -> None:
    result = run("derive", "gated_deltanet", "--optimizer", "sgd", "--scaling", "head-dim-fixed", "--format", "json")
    rules = {rule["role"]: rule for rule in json.loads(result.stdout)["rules"]}
    assert rules["a_proj"]["lr"] == "0"


def test_explain_ends_in_the_rule() -> None:
    output = run("explain", "gated_deltanet", "a_proj", "--optimizer", "sgd").stdout
    assert "lr n^-1/2" in output.splitlines()[-1]
    assert "incoherent over d_v (flipping o_proj" in output  # the one decision the rule hangs on


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "rules.toml"
    assert run("derive", "mlp", "--format", "toml", "-o", str(path)).exit_code == 0
    assert run("show", str(path)).exit_code == 0
    path.write_text(path.read_text().replace('"-1"', '"-2"'))
    result = run("show", str(path))
    assert result.exit_code == 2
    assert "hash" in result.stderr
    path.write_bytes(b"\xff\xfe\x00")
    assert run("show", str(path)).exit_code == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ("derive", "gated_deltanets"),
        ("derive", "gated_deltanet", "--optimizer", "x"),
        ("derive", "gated_deltanet", "--scaling", "x"),
        ("derive", "gated_deltanet", "-O", "x=1"),
        ("derive", "gated_deltanet", "-O", "activation"),
        ("derive", "gated_deltanet", "--preset", "liu-gu-2026", "--assume", "aligned"),
        ("derive", "gated_deltanet", "--fix", "a_proj.lr=0", "--fix", "a_proj.lr=1"),
        ("derive", "no_such_module:graph"),
        ("derive", "json:dumps"),
        ("explain", "gated_deltanet", "z_proj"),
        ("derive", "mlp", "--scaling", "mixed"),
        ("derive", "mlp", "-O", "activation=rms_norm"),
        ("derive", "mlp", "-O", "activation=softmax"),
        ("derive", "mlp", "-O", "depth=²"),
        ("derive", "mlp", "-O", "depth=0"),
        ("derive", ":x"),
        ("derive", ".x:y"),
        ("derive", "gated_deltanet", "--scaling", "mixed", "-O", "scaling=heads-fixed"),
        ("derive", "gated_deltanet", "--tied", "-O", "tied=off"),
        ("derive", "mlp", "-o", "/nonexistent/folder/x"),
        ("derive", "mlp", "--format", "json", "-o", "/nonexistent/folder/x"),
    ],
)
def test_mistakes_exit_2_with_one_clear_error(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert "to do: " in result.stderr
    assert "Traceback" not in result.output


def test_a_users_own_architecture(tmp_path: Path) -> None:
    (tmp_path / "variant.py").write_text(
        "from widthwise.derive import Builder\n"
        "def graph(width='1'):\n"
        "    g = Builder('variant')\n"
        "    h = g.pointwise('gelu', g.linear(g.input('x', g.dim('F')), 'inner', g.dim('n', width)))\n"
        "    g.cross_entropy(g.readout(h, 'head', g.dim('V')))\n"
        "    return g.build()\n"
    )
    result = subprocess.run(
        [sys.executable, "-m", "widthwise", "derive", "variant:graph", "-O", "width=1/2", "--format", "json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(Path(__file__).parents[1] / "src")},
    )
    assert result.returncode == 0, result.stderr
    assert {rule["role"]: rule["multiplier"] for rule in json.loads(result.stdout)["rules"]}["head"] == "-1/2"


def test_the_core_imports_no_torch() -> None:
    code = "import sys, widthwise.cli, widthwise.derive, widthwise.codegen; sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], check=False, env={"PYTHONPATH": str(Path(__file__).parents[1] / "src")}
        ).returncode
        == 0
    )


def test_options_are_read_as_the_kind_of_their_default() -> None:
    assert run("derive", "mlp", "-O", "depth=1").exit_code == 0
    assert run("derive", "gated_deltanet", "-O", "qk_scale=1", "-O", "activation=off").exit_code == 0


def test_a_users_function_that_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "raising.py").write_text("def graph():\n    raise RuntimeError('mine')\n")
    monkeypatch.syspath_prepend(tmp_path)
    result = run("derive", "raising:graph")
    assert result.exit_code == 2
    assert "RuntimeError: mine" in result.stderr


def test_a_terminal_without_greek() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "widthwise", "derive", "mlp"],
        capture_output=True,
        check=False,
        env={"PYTHONPATH": str(Path(__file__).parents[1] / "src"), "PYTHONIOENCODING": "ascii"},
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("old", "new"), [('role = "input"', 'role = "[/x]"'), ("assumptions = [", "assumptions = []\nx = [")]
)
def test_hostile_files_are_shown_or_refused(tmp_path: Path, old: str, new: str) -> None:
    from widthwise.derive import architecture, derive, write_toml

    text = write_toml(derive(architecture("mlp")))
    assert old in text
    path = tmp_path / "hostile.toml"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    assert run("show", str(path)).exit_code == 2


def test_markup_in_a_table_is_text() -> None:
    from dataclasses import replace

    from rich.console import Console

    from widthwise.derive import Finding, Rule, architecture, derive
    from widthwise.derive.exponents import ZERO
    from widthwise.derive.render import terminal

    table = replace(
        derive(architecture("mlp")),
        architecture="[/red]",
        rules=(Rule("[/x]", shape=("[/y]",)),),
        findings=(Finding("[/bold]", "[/a]", ZERO, "[/b]", "[/c]"),),
    )
    console = Console(width=100)
    with console.capture() as shown:
        for part in terminal(table, assumptions=True):
            console.print(part)
    assert all(each in shown.get() for each in ("[/red]", "[/x]", "[/y]", "[/bold]", "[/a]", "[/b]", "[/c]"))
