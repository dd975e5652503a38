"""Rendering: one row a template, strict and deterministic, under a header that says what a file was made from.

What a description contributes to a file is either a name, which must be one, or a line of prose, which goes into
comments and must be one line; :mod:`widthwise.codegen.text` refuses everything else.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined, TemplateError, meta

from widthwise.codegen import model, parametrization, text
from widthwise.codegen.request import Request
from widthwise.derive import Graph, RuleTable
from widthwise.derive.errors import DeriveError, unknown_name


@dataclass(frozen=True)
class Target:
    """What can be emitted: a template, and what fills it."""

    template: str
    context: Callable[[Graph, RuleTable], dict[str, Any]]
    summary: str


TARGETS: Mapping[str, Target] = {
    "parametrization": Target(
        "parametrization.py.jinja", parametrization.context, "init_, param_groups, set_multipliers (torch alone)"
    ),
    "model": Target("model.py.jinja", model.context, "the nn.Module of the same graph, on the scan"),
}


def render(request: Request, emit: str = "parametrization") -> str:
    """The source text of a target: equal requests give equal bytes.

    Raises:
        DeriveError: when there is no such target, no derivation, or the description cannot be written as code.
    """
    if emit not in TARGETS:
        raise unknown_name("target", emit, list(TARGETS))
    target = TARGETS[emit]
    graph = request.graph()
    table = request.table(graph)
    text.check_names(graph)
    command = f"widthwise generate {request.arguments}" + ("" if emit == "parametrization" else f" --emit {emit}")
    context = target.context(graph, table) | {"graph": graph, "table": table, "command": command}
    try:
        written = (
            _environment().get_template(target.template).render(context, template_hash=template_hash(target.template))
        )
        ast.parse(written)
    except (TemplateError, SyntaxError) as error:
        raise DeriveError(
            f"{target.template} made no Python: {type(error).__name__}: {error}", cure="mend the template"
        ) from None
    return written


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FunctionLoader(_source),
        undefined=StrictUndefined,
        autoescape=False,  # Python, not HTML: the filters below check what goes in
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "quoted": text.quoted,
        "line": text.line,
        "number": text.number,
        "wrapped": text.wrapped,
    }
    return environment


@cache
def _source(name: str) -> str:
    return (files("widthwise.codegen") / "templates" / name).read_text(encoding="utf-8")


@cache
def template_hash(name: str) -> str:
    """SHA-256 over a template and all that it includes."""
    digest = hashlib.sha256()
    waiting, seen = [name], set()
    while waiting:
        each = waiting.pop()
        if each not in seen:
            seen.add(each)
            digest.update(_source(each).encode())
            included = meta.find_referenced_templates(_environment().parse(_source(each)))
            waiting += sorted(other for other in included if other is not None)
    return f"sha256:{digest.hexdigest()}"
