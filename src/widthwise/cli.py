"""The command line. Heavy imports wait until a command needs them, so that ``--help`` is instant."""

from __future__ import annotations

import importlib
import inspect
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from widthwise.derive import Graph, RuleTable

Command = TypeVar("Command", bound=Callable[..., Any])


class _Group(click.Group):
    """Turns a DeriveError into one clear message and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ValueError as error:
            from widthwise.derive.errors import DeriveError

            if not isinstance(error, DeriveError):
                raise
            click.secho(f"error: {error.what}", fg="red", err=True)
            if error.where:
                click.echo(f"  where: {error.where}", err=True)
            if error.cure:
                click.echo(f"  to do: {error.cure}", err=True)
            ctx.exit(2)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="widthwise")
def cli() -> None:
    """Derive how hyperparameters must scale with width, so that one small sweep serves every size."""


def _request(command: Command) -> Command:
    """The options that say what to derive, shared by all commands that do."""
    for option in reversed(
        (
            click.argument("architecture"),
            click.option(
                "--optimizer", default="adamw", show_default=True, help="sgd, adam, adamw, lion, muon, adafactor"
            ),
            click.option("--scaling", help="heads-fixed, head-dim-fixed or mixed (d_head ∝ n^h, symbolic)"),
            click.option("--assume", help="assumption set: at-init (default), aligned, unaligned"),
            click.option("--preset", help="assumptions of a publication, e.g. liu-gu-2026"),
            click.option("--regime", help="practical (default) or asymptotic: below or past the crossovers"),
            click.option("--parametrization", help="fix init and multipliers: standard, ntk, mean-field, mup"),
            click.option(
                "--fix",
                multiple=True,
                metavar="ROLE.KNOB=EXPONENT",
                help="fix one knob by hand, e.g. a_proj.init_std=-1/2 (repeatable)",
            ),
            click.option("--gauge", default="multiplier", show_default=True, help="multiplier or absorbed"),
            click.option("--tied", is_flag=True, help="tie the readout to the token embedding"),
            click.option(
                "--option",
                "-O",
                "options",
                multiple=True,
                metavar="NAME=VALUE",
                help="an option of the architecture (see widthwise list), e.g. activation=off (repeatable)",
            ),
        )
    ):
        command = option(command)
    return command


@cli.command()
@_request
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "json", "toml", "markdown", "latex"]),
    default="table",
    show_default=True,
)
@click.option("--assumptions", is_flag=True, help="also print everything that was assumed")
@click.option("--output", "-o", type=click.Path(dir_okay=False, path_type=Path), help="write to a file")
def derive(form: str, assumptions: bool, output: Path | None, **request: Any) -> None:
    """Derive the rules of ARCHITECTURE, a known one or yours as package.module:function."""
    _emit(_table(**request), form, output, assumptions)


@cli.command()
@_request
@click.argument("role")
def explain(role: str, **request: Any) -> None:
    """The proof of the rule of ROLE, step by step."""
    from widthwise.derive.proof import proof_lines

    click.echo("\n".join(proof_lines(_table(**request), role)))


@cli.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "json", "toml", "markdown", "latex"]),
    default="table",
    show_default=True,
)
@click.option("--output", "-o", type=click.Path(dir_okay=False, path_type=Path), help="write to a file")
def show(file: Path, form: str, output: Path | None) -> None:
    """Read a rule table from a TOML FILE, check its hash, and print it."""
    from widthwise.derive.errors import DeriveError
    from widthwise.derive.toml_io import read_toml

    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DeriveError(
            f"cannot read {file}: {error}", cure="give a rule table written by widthwise derive"
        ) from None
    _emit(read_toml(text, str(file)), form, output, True)


@cli.command("list")
def list_() -> None:
    """Architectures with their options, optimizers, assumption sets, presets, parametrizations."""
    from widthwise.derive.architectures import ARCHITECTURES, options
    from widthwise.derive.architectures.common import SCALINGS
    from widthwise.derive.assume import PRESETS, SETS
    from widthwise.derive.optimizers import OPTIMIZERS
    from widthwise.derive.parametrization import PARAMETRIZATIONS

    def section(title: str, rows: list[tuple[str, str]]) -> None:
        click.secho(title, bold=True)
        for name, text in rows:
            click.echo(f"  {name:24} {text}")

    section(
        "architectures",
        [(name, ", ".join(f"{key}={_plain(value)}" for key, value in options(name).items())) for name in ARCHITECTURES],
    )
    section(
        "scalings", [(name, f"d_head ∝ n^{each.head_dim}, heads ∝ n^({each.heads})") for name, each in SCALINGS.items()]
    )
    section("optimizers", [(name, law.summary) for name, law in OPTIMIZERS.items()])
    section("assumption sets", [(name, each.source) for name, each in SETS.items()])
    section("presets", [(name, each.source) for name, each in PRESETS.items()])
    section("parametrizations", [(name, "fixes init and multipliers; the rest is solved") for name in PARAMETRIZATIONS])


def _plain(value: object) -> str:
    return {True: "on", False: "off"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def _table(
    architecture: str,
    optimizer: str,
    scaling: str | None,
    assume: str | None,
    preset: str | None,
    regime: str | None,
    parametrization: str | None,
    fix: tuple[str, ...],
    gauge: str,
    tied: bool,
    options: tuple[str, ...],
) -> RuleTable:
    from widthwise.derive.errors import DeriveError
    from widthwise.derive.pipeline import derive as derive_rules

    chosen = _pairs(options, "--option")
    for name, value in (("scaling", scaling), ("tied", "on" if tied else None)):
        if value is not None and chosen.setdefault(name, value) != value:
            raise DeriveError(f"--{name} and --option {name}={chosen[name]} contradict each other", cure="give one")
    return derive_rules(
        _graph(architecture, chosen),
        optimizer,
        assume,
        preset=preset,
        regime=regime,
        parametrization=parametrization,
        fix=_pairs(fix, "--fix"),
        gauge=gauge,
    )


def _pairs(texts: tuple[str, ...], option: str) -> dict[str, str]:
    from widthwise.derive.errors import DeriveError

    pairs: dict[str, str] = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator:
            raise DeriveError(f"{option} {text!r} has no value", cure=f"write {option} NAME=VALUE")
        if pairs.setdefault(name, value) != value:
            raise DeriveError(f"{option} gives {name} two values, {pairs[name]!r} and {value!r}", cure="give it once")
    return pairs


def _value(text: str, default: object) -> object:
    """The text of an option as the kind of thing its default is."""
    switches = {"on": True, "true": True, "yes": True, "off": False, "false": False, "no": False}
    if isinstance(default, bool):
        return switches.get(text.lower(), text)
    if isinstance(default, int):
        return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else text
    if isinstance(default, tuple):
        return tuple(text.split(","))
    return text


def _graph(name: str, options: dict[str, str]) -> Graph:
    from widthwise.derive import Graph, architecture
    from widthwise.derive.architectures import options as options_of
    from widthwise.derive.errors import DeriveError

    if ":" not in name:
        known = options_of(name)
        return architecture(name, **{key: _value(value, known.get(key)) for key, value in options.items()})
    module, _, function = name.partition(":")
    sys.path.insert(0, "")
    try:
        found = getattr(importlib.import_module(module), function)
        if callable(found):
            defaults = {each.name: each.default for each in inspect.signature(found).parameters.values()}
            found = found(**{key: _value(value, defaults.get(key)) for key, value in options.items()})
    except DeriveError:
        raise
    except Exception as error:  # whatever somebody else's code raises is their mistake to read, not a traceback of ours
        raise DeriveError(
            f"{name} could not be built: {type(error).__name__}: {error}",
            cure="give package.module:function, importable from here, that takes its options as keywords",
        ) from None
    if not isinstance(found, Graph):
        raise DeriveError(f"{name} gave {type(found).__name__}, not a Graph", cure="end it with Builder.build()")
    return found


def _emit(table: RuleTable, form: str, output: Path | None, assumptions: bool) -> None:
    from widthwise.derive import render
    from widthwise.derive.errors import DeriveError
    from widthwise.derive.toml_io import write_toml

    if form == "table":
        from rich.console import Console

        text = io.StringIO()
        color = output is None and sys.stdout.isatty()
        console = Console(file=text, width=None if color else 110, force_terminal=color, highlight=False)
        for part in render.terminal(table, assumptions=assumptions):
            console.print(part)
        written = text.getvalue()
    else:
        written = {
            "json": lambda: json.dumps(table.as_dict(), indent=2, ensure_ascii=False) + "\n",
            "toml": lambda: write_toml(table),
            "markdown": lambda: render.markdown(table),
            "latex": lambda: render.latex_table(table),
        }[form]()
    if output is None:
        click.echo(written, nl=False)
        return
    try:
        output.write_text(written, encoding="utf-8")
    except OSError as error:
        raise DeriveError(
            f"cannot write {output}: {error.strerror}", cure="give a file in a folder that exists"
        ) from None


def main() -> None:
    """Entry point of the ``widthwise`` script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without the field's Greek gets escapes, not a crash
            stream.reconfigure(errors="backslashreplace")
    cli()
