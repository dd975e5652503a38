"""The command line. Heavy imports wait until a command needs them, so that ``--help`` is instant."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from widthwise.derive import RuleTable

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
            click.option(
                "--assume",
                help="assumption set: at-init (default), aligned, unaligned; "
                "under SGD carrying-channel, first-channel, largest-channel",
            ),
            click.option("--preset", help="assumptions of a publication, e.g. liu-gu-2026"),
            click.option(
                "--regime",
                help="practical (default): below the crossovers, asymptotic: past them, or throughout: rates for both",
            ),
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
    from widthwise.codegen.request import Request
    from widthwise.codegen.tables import derived_text

    asked = Request(**request)
    if form in ("toml", "markdown"):
        _write(derived_text(asked, form), output)
    else:
        _emit(asked.table(), form, output, assumptions)


@cli.command()
@_request
@click.option("--emit", default="parametrization", show_default=True, help="parametrization or model")
@click.option("--output", "-o", type=click.Path(dir_okay=False, path_type=Path), help="write to a file")
def generate(emit: str, output: Path | None, **request: Any) -> None:
    """Write ARCHITECTURE's rules as a PyTorch module: init_, param_groups, set_multipliers; or the model itself."""
    from widthwise.codegen.render import render
    from widthwise.codegen.request import Request

    _write(render(Request(**request), emit), output)


@cli.command()
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path))
@click.option("--write", is_flag=True, help="bring files that differ up to date")
@click.option("--imports", is_flag=True, help="let files name architectures of your own, whose code is then run")
def check(paths: tuple[Path, ...], write: bool, imports: bool) -> None:
    """Make every generated file under PATHS (default: here) again; show differences, and exit with 1 if any."""
    from widthwise.codegen.drift import check_file, generated_files
    from widthwise.derive.errors import DeriveError

    files = list(generated_files(paths or (Path(),)))
    if not files:
        raise DeriveError(
            f"no file under {' '.join(map(str, paths)) or 'here'} was made by widthwise", cure="give the right folder"
        )
    drifts = [drift for file in files if (drift := check_file(file, imports)) is not None]
    for drift in drifts:
        click.secho(f"{drift.path}: {drift.what}", fg="red")
        for line in drift.diff.splitlines():
            click.secho(f"    {line}", fg={"+": "green", "-": "red"}.get(line[:1]))
        if write and drift.expected:
            _write(drift.expected, drift.path)
    left = [drift for drift in drifts if not (write and drift.expected)]
    written = f", {len(drifts) - len(left)} brought up to date" if write else ""
    click.echo(f"{len(files)} generated files, {len(left)} out of date{written}")
    if left:
        click.echo("to do: widthwise check --write, and read the difference", err=True)
        sys.exit(1)


@cli.command()
@_request
@click.argument("role")
def explain(role: str, **request: Any) -> None:
    """The proof of the rule of ROLE, step by step."""
    from widthwise.codegen.request import Request
    from widthwise.derive.proof import proof_lines

    click.echo("\n".join(proof_lines(Request(**request).table(), role)))


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


@cli.command()
@click.option(
    "--data", type=click.Path(path_type=Path), help="a file or folder of text (default: Python's own library)"
)
@click.option("--seconds", default=60.0, show_default=True, help="about how long to train in all")
@click.option(
    "--output", "-o", type=click.Path(file_okay=False, path_type=Path), default=Path("out"), show_default=True,
    help="folder for the generated files",
)  # fmt: skip
def demo(data: Path | None, seconds: float, output: Path) -> None:
    """Train a generated model at two widths with one learning rate, standard parametrization beside ours."""
    with _torch():
        from widthwise.verify.demo import demo as run
    run(data, output, seconds)


@cli.command()
@click.argument("files", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--output", "-o", type=click.Path(path_type=Path), help="results, or a folder (default: FILE.jsonl)")
@click.option("--executor", default="local", show_default=True, help="local, or ray for a Ray cluster")
@click.option("--jobs", default=1, show_default=True, type=click.IntRange(1), help="runs at a time, on each GPU")
@click.option("--plot/--no-plot", default=True, show_default=True, help="a picture beside the results")
def sweep(files: tuple[Path, ...], output: Path | None, executor: str, jobs: int, plot: bool) -> None:
    """Train the grids of FILES (TOML): widths × learning rates × parametrizations × seeds; goes on where it stopped."""
    with _torch():
        from widthwise.verify.transfer.config import read_sweep
        from widthwise.verify.transfer.results import Results
        from widthwise.verify.transfer.settings import own
        from widthwise.verify.transfer.sweep import STOPPED, carry_out
    folder = output is not None and (output.is_dir() or len(files) > 1)
    paths = [file.with_suffix(".jsonl") for file in files]
    if output is not None:
        paths = [output / path.name if folder else output for path in paths]
    sweeps = [(read_sweep(file), path) for file, path in zip(files, paths, strict=True)]
    failures = carry_out(sweeps, executor, jobs)
    for each, path in sweeps:
        if entries := list(own(each, Results(path).load().values())):
            _transfer(entries, path.with_suffix(".png") if plot else None)
    if failed := len(failures) - failures.count(STOPPED):
        click.secho(f"{failed} run{'s' * (failed > 1)} failed; the same command tries again", fg="red", err=True)
    if STOPPED in failures:
        click.secho(STOPPED, fg="red", err=True)
    if failures:
        sys.exit(1)


@cli.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--parametrization", default="widthwise", show_default=True, help="one of FILE's")
@click.option("--width", type=int, help="(default: the largest of FILE)")
@click.option("--lr", type=float, required=True, help="learning rate at the base width")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--strategy", default="ddp", show_default=True, help="under torchrun: ddp, or fsdp (FSDP2)")
@click.option("--output", "-o", type=click.Path(dir_okay=False, path_type=Path), help="results to add the run to")
def train(
    file: Path, parametrization: str, width: int | None, lr: float, seed: int, strategy: str, output: Path | None
) -> None:
    """Train one model as FILE (of a sweep) says, at any learning rate; on many GPUs when torchrun starts this."""
    with _torch():
        from widthwise.verify.transfer.command import train_one
    train_one(file, parametrization, width, lr, seed, strategy, output)


@cli.command()
@click.argument("results", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--output", "-o", type=click.Path(dir_okay=False, path_type=Path), help="picture (default: RESULTS.png)")
@click.option("--markdown", is_flag=True, help="print the table for a page")
def plot(results: Path, output: Path | None, markdown: bool) -> None:
    """Loss against learning rate, a line a width, from a sweep's RESULTS; and what transfer costs."""
    from widthwise.derive.errors import DeriveError

    with _torch():
        from widthwise.verify.transfer import report
        from widthwise.verify.transfer.results import Results
        from widthwise.verify.transfer.settings import check_comparable
    if not (entries := list(Results(results).load().values())):
        raise DeriveError(f"{results} holds no finished run", cure="widthwise sweep makes some")
    check_comparable(entries, results)
    if markdown:
        click.echo(report.markdown(entries), nl=False)
    else:
        _transfer(entries, output or results.with_suffix(".png"), needed=True)


def _transfer(entries: Sequence[Mapping[str, Any]], picture: Path | None, needed: bool = False) -> None:
    """Table and picture; a picture that is not needed is left out, with a word why, where it cannot be made."""
    from rich.console import Console

    from widthwise.derive.errors import DeriveError
    from widthwise.verify.transfer import report

    console = Console(highlight=False)
    if not console.is_terminal:  # whoever reads it from a file has room for it
        console.width = max(console.width, 140)
    console.print(report.table(entries))
    if picture is None:
        return
    try:
        report.plot(entries, picture)
        click.echo(f"plotted to {picture}")
    except DeriveError as error:
        if needed:
            raise
        click.echo(f"no picture: {error.what} ({error.cure})")


@contextlib.contextmanager
def _torch() -> Iterator[None]:
    """Says how to get torch where it is missing."""
    from widthwise.derive.errors import DeriveError

    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("torch", "triton"):
            raise
        raise DeriveError(
            f"this needs {error.name}, which is not installed", cure="pip install 'widthwise[torch]'"
        ) from None


class _Spread(click.Command):
    """Lets ``--widths`` take several values after it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        spread: list[str] = []
        for arg in args:
            if arg.isdecimal() and len(spread) > 1 and spread[-2] == "--widths" and spread[-1].isdecimal():
                spread.append("--widths")
            spread.append(arg)
        return super().parse_args(ctx, spread)


@cli.command("coord-check", cls=_Spread)
@_request
@click.option("--widths", multiple=True, type=int, default=(64, 128, 256), show_default=True, help="three or more")
@click.option("--base-width", type=int, help="where hyperparameters were tuned (default: the smallest width)")
@click.option(
    "--rules",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="a rule table (derive --format toml); ARCHITECTURE is then a factory make_model(width)",
)
@click.option(
    "--description", metavar="TEXT", help="the graph of RULES: what was traced (FILE.toml), or MODULE:FUNCTION"
)
@click.option("--lr", type=float, help="learning rate at the base width")
@click.option("--seeds", type=int, help="how many (default: 10; thorough: 40)")
@click.option("--first-seed", type=int, default=0, show_default=True, help="the first of them")
@click.option("--steps", type=int, help="optimizer steps (default: 2; thorough: 4)")
@click.option("--thorough", is_flag=True, help="more seeds and steps")
@click.option("--strict", is_flag=True, help="fail where something is not resolved, too")
@click.option("--alignment", is_flag=True, help="measure instead how coherent each kind of sum is")
@click.option("--graph", is_flag=True, help="run the description itself rather than the generated model")
@click.option("--plot/--no-plot", default=True, show_default=True, help="coord_check.png, standard beside these rules")
@click.option(
    "--output", "-o", type=click.Path(file_okay=False, path_type=Path), default=Path(), help="folder for the files"
)
def coord_check(**options: Any) -> None:
    """Hold every predicted exponent of ARCHITECTURE against training; exit with 1 where one fails."""
    from widthwise.codegen.request import Request

    with _torch():
        from widthwise.verify.coord.command import Asked, command
    request = {field.name: options.pop(field.name) for field in dataclasses.fields(Request)}
    sys.exit(command(Request(**request), Asked(**options)))


@cli.command(cls=_Spread)
@click.argument("target")
@click.option("--widths", multiple=True, type=int, default=(128, 160, 224), show_default=True, help="two or three")
@click.option("--name", default="", help="what the graph is called (default: the function)")
@click.option("--output", "-o", type=click.Path(dir_okay=False, path_type=Path), help="write to a file")
def trace(target: str, widths: tuple[int, ...], name: str, output: Path | None) -> None:
    """Trace TARGET, a package.module:function from a width to (module, example inputs), as a graph for derive.

    The model is made on the meta device at each width, so that its size costs no memory.
    """
    with _torch():
        from widthwise.verify.trace.command import traced_text
    text, warnings = traced_text(target, widths, name)
    for warning in warnings:
        click.secho(f"warning: {warning}", fg="yellow", err=True)
    _write(text, output)


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


def _emit(table: RuleTable, form: str, output: Path | None, assumptions: bool) -> None:
    from widthwise.derive import render
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
    _write(written, output)


def _write(written: str, output: Path | None) -> None:
    from widthwise.derive.errors import DeriveError

    if output is None:
        click.echo(written, nl=False)
        return
    try:
        output.write_text(written, encoding="utf-8", newline="\n")
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
