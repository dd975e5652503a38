"""What a user asked for, as one value: the command line makes it, generated files carry it, the check reads it back."""

from __future__ import annotations

import importlib
import inspect
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from widthwise.derive import Graph, RuleTable, architecture, derive
from widthwise.derive.architectures import options as options_of
from widthwise.derive.errors import DeriveError

SWITCHES = {"on": True, "true": True, "yes": True, "off": False, "false": False, "no": False}


@dataclass(frozen=True)
class Request:
    """One derivation. Fields are named as the command line's options are; ``options`` and ``fix`` hold NAME=VALUE."""

    architecture: str
    optimizer: str = "adamw"
    scaling: str | None = None
    assume: str | None = None
    preset: str | None = None
    regime: str | None = None
    parametrization: str | None = None
    fix: tuple[str, ...] = ()
    gauge: str = "multiplier"
    tied: bool = False
    options: tuple[str, ...] = ()

    @property
    def arguments(self) -> str:
        """The arguments that ask for this again, in one canonical order."""
        words = [self.architecture]
        for field in fields(self)[1:]:
            value, flag = getattr(self, field.name), f"--{field.name.removesuffix('s')}"
            if field.name == "tied":
                words += ["--tied"] if value else []
            elif isinstance(value, tuple):
                words += [word for each in value for word in (flag, each)]
            elif value != field.default:
                words += [flag, value]
        return shlex.join(words)

    @property
    def imports(self) -> bool:
        """Whether the architecture is somebody's own, which takes an import to see."""
        return ":" in self.architecture and not self.architecture.endswith(".toml")

    def graph(self) -> Graph:
        """The description.

        Raises:
            DeriveError: when there is none of that name, or it cannot be built.
        """
        chosen = _pairs(self.options, "--option")
        for name, value in (("scaling", self.scaling), ("tied", "on" if self.tied else None)):
            if value is not None and chosen.setdefault(name, value) != value:
                raise DeriveError(f"--{name} and --option {name}={chosen[name]} contradict each other", cure="give one")
        if self.architecture.endswith(".toml"):
            return _read(self.architecture, chosen)
        if self.imports:
            return _imported(self.architecture, chosen)
        known = options_of(self.architecture)
        return architecture(self.architecture, **{key: _value(text, known.get(key)) for key, text in chosen.items()})

    def table(self, graph: Graph | None = None) -> RuleTable:
        """The rules.

        Raises:
            DeriveError: when the request has no derivation.
        """
        return derive(
            self.graph() if graph is None else graph,
            self.optimizer,
            self.assume,
            preset=self.preset,
            regime=self.regime,
            parametrization=self.parametrization,
            fix=_pairs(self.fix, "--fix"),
            gauge=self.gauge,
        )


def parse(words: Iterable[str]) -> tuple[Request, dict[str, str]]:
    """The request that :attr:`Request.arguments` wrote, and options that are not its own (``--emit model``).

    Raises:
        DeriveError: for anything but NAME and ``--option VALUE`` pairs, each of which is known.
    """
    given = list(words)
    known = {f"--{field.name.removesuffix('s')}": field for field in fields(Request)[1:]}
    chosen: dict[str, Any] = {}
    other: dict[str, str] = {}
    if not given or given[0].startswith("-"):
        raise DeriveError("the command names no architecture", cure="generate the file again")
    rest = iter(given[1:])
    for flag in rest:
        if flag == "--tied":
            chosen["tied"] = True
            continue
        value = next(rest, None)
        if value is None or not flag.startswith("--"):
            raise DeriveError(f"the command has a stray {flag!r}", cure="generate the file again")
        if flag not in known:
            other[flag.removeprefix("--")] = value
        elif known[flag].default == ():
            chosen[known[flag].name] = (*chosen.get(known[flag].name, ()), value)
        else:
            chosen[known[flag].name] = value
    return Request(given[0], **chosen), other


def _pairs(texts: tuple[str, ...], option: str) -> dict[str, str]:
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
    if isinstance(default, bool):
        return SWITCHES.get(text.lower(), text)
    if isinstance(default, int):
        return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else text
    if isinstance(default, tuple):
        return tuple(text.split(","))
    return text


def _read(name: str, options: dict[str, str]) -> Graph:
    """The graph in a file that ``widthwise trace`` wrote."""
    from widthwise.derive.graph_toml import read_graph

    if options:
        raise DeriveError(f"a traced graph has no option {next(iter(options))!r}", cure="trace another variant")
    try:
        text = Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DeriveError(f"cannot read {name}: {error}", cure="give a file written by widthwise trace") from None
    return read_graph(text, name)


def _imported(name: str, options: dict[str, str]) -> Graph:
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
    finally:
        sys.path.remove("")
    if not isinstance(found, Graph):
        raise DeriveError(f"{name} gave {type(found).__name__}, not a Graph", cure="end it with Builder.build()")
    return found
