"""What the README shows is what the program prints, and its Python runs."""

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from widthwise.cli import cli

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
CONSOLE = re.findall(r"```console\n\$ (widthwise [^\n]+)\n(.*?)```", README, re.S)
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.mark.parametrize(("command", "shown"), CONSOLE, ids=[command for command, _ in CONSOLE])
def test_console_output_is_current(command: str, shown: str) -> None:
    result = CliRunner().invoke(cli, shlex.split(command)[1:])
    assert result.exit_code == 0
    assert [line.rstrip() for line in result.stdout.rstrip().splitlines()] == shown.rstrip().splitlines()


def test_the_variant_derives(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = PYTHON
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.startswith("-1 [")


def test_there_is_something_to_check() -> None:
    assert len(CONSOLE) >= 2
