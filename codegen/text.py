"""From values to source text: what may be written into a file, and how. Jinja filters, all of them strict."""

from __future__ import annotations

import json
import keyword
import re
import textwrap

from sympy import Expr, Rational

from widthwise.derive.errors import DeriveError
from widthwise.derive.exponents import n_to
from widthwise.derive.graph import Graph, atoms

WIDTH = 120
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PATTERN = re.compile(r"(\*|[A-Za-z0-9_]+)(\.(\*|[A-Za-z0-9_]+))*")  # layers have numbers for names


def check_names(graph: Graph) -> None:
    """Refuse a description whose names could not be names in code.

    Raises:
        DeriveError: naming the first one that is not an ASCII identifier (or, for parameters, a dotted glob of them).
    """
    for what, name in (("architecture", graph.name), ("title", graph.title or "untitled")):
        _check(what, name, "")
    for role, parameter in graph.parameters.items():
        _check("role", role, parameter.where)
        for pattern in parameter.patterns:
            if not _PATTERN.fullmatch(pattern) or any(map(keyword.iskeyword, pattern.split("."))):
                raise _refused("parameter name", pattern, parameter.where)
        for dim in atoms(parameter.shape):
            _check("axis", dim.name, parameter.where)
    for node in graph.nodes:
        if node.attrs.get("carrier"):
            _check("multiplier", str(node.attrs["carrier"]), node.where)
        for dim in atoms(node.shape):
            _check("axis", dim.name, node.where)


def _check(what: str, name: str, where: str) -> None:
    if not _NAME.fullmatch(name) or keyword.iskeyword(name):
        raise _refused(what, name, where)


def _refused(what: str, name: str, where: str) -> DeriveError:
    return DeriveError(f"{what} {name!r} cannot be a name in code", where=where, cure="use ASCII letters, digits and _")


def quoted(value: str) -> str:
    """A string literal with double quotes."""
    return json.dumps(line(value), ensure_ascii=False)


def line(value: str) -> str:
    """One line of prose, for comments and docstrings.

    Raises:
        DeriveError: for text that could end either.
    """
    if not value.isprintable() or "\\" in value or '"' in value:
        raise DeriveError(
            f"{value[:60]!r} cannot be written into a file",
            cure="use names without quotes, backslashes and control characters",
        )
    return value


def wrapped(value: str, indent: int) -> str:
    """Prose as comment lines at an indent."""
    lead = " " * indent + "# "
    return textwrap.fill(line(value), WIDTH, initial_indent=lead, subsequent_indent=lead, break_on_hyphens=False)


def number(value: Expr) -> str:
    """An exponent as an exact Python expression.

    Raises:
        DeriveError: for a symbolic one, which has no number.
    """
    if not isinstance(value, Rational):
        raise DeriveError(f"{n_to(value)} is symbolic", cure="generate for one scaling, not the mixed one")
    return str(value.p) if value.q == 1 else f"{value.p} / {value.q}"


def power(value: Expr) -> str:
    """An exponent as readers know it, n^-1/2."""
    return line(n_to(value))


def call(function: str, arguments: list[str], indent: int) -> str:
    """A call as an element of a tuple, laid out as the formatter would: on one line, on three, or one an argument."""
    lead, inner = " " * indent, " " * (indent + 4)
    together = ", ".join(arguments)
    if len(f"{lead}{function}({together}),") <= WIDTH:
        return f"{lead}{function}({together}),"
    if len(inner + together) <= WIDTH:
        return f"{lead}{function}(\n{inner}{together}\n{lead}),"
    return "\n".join([f"{lead}{function}(", *(f"{inner}{argument}," for argument in arguments), f"{lead}),"])
