"""Nothing that a description says can become code."""

import ast
from dataclasses import replace
from types import MappingProxyType

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from widthwise.codegen import parametrization, render, text
from widthwise.codegen.request import Request
from widthwise.derive import Builder, Graph, derive
from widthwise.derive.errors import DeriveError

HOSTILE = [
    "x'); import os; os.system('true') #",
    'x"); raise SystemExit #',
    "x\nimport os",
    'x"""\nimport os\n"""',
    "{{ 7 * 7 }}",
    "{% include 'draw.py.jinja' %}",
    "x\\",
    "x\u2028y",
    "x\x0cimport os",
    "class",
    "",
    " ",
    "a b",
    "ｘ",  # normalizes to an ASCII name in Python source
    "*",
]


def graph(axis: str = "n", tensor: str = "h", name: str = "own", title: str = "Own", carrier: str = "factor") -> Graph:
    g = Builder(name, title=title)
    n = g.dim(axis, 1)
    h = g.linear(g.input("x", g.dim("features")), "up", n, output=tensor)
    h = g.norm(g.scale(g.pointwise("relu", h), multiplier=carrier), "gain")
    g.cross_entropy(g.readout(h, "head", g.dim("classes")))
    return g.build()


def source(made: Graph) -> str:
    """What render does, for a graph that is no request."""
    table = derive(made)
    text.check_names(made)
    context = parametrization.context(made, table)
    template = render._environment().get_template("parametrization.py.jinja")
    return template.render(context, graph=made, table=table, command="widthwise generate x", template_hash="sha256:0")


def structure(code: str) -> list[str]:
    """The kinds of all nodes of a program: what it does, whatever its strings say."""
    return [type(node).__name__ for node in ast.walk(ast.parse(code))]


@pytest.mark.parametrize("place", ["axis", "name", "title", "carrier"])
@pytest.mark.parametrize("hostile", HOSTILE)
def test_names_that_are_not_names_are_refused(place: str, hostile: str) -> None:
    if (place, hostile) == ("title", "") or (place, hostile) == ("carrier", ""):
        return  # no title, no multiplier
    with pytest.raises(DeriveError):
        source(graph(**{place: hostile}))


@pytest.mark.parametrize("hostile", HOSTILE)
def test_parameter_names_that_are_not_names_are_refused(hostile: str) -> None:
    made = graph()
    parameter = replace(made.parameters["up"], patterns=(f"layers.{hostile}.weight",))
    if hostile == "*":
        return  # which is a glob
    with pytest.raises(DeriveError):
        source(replace(made, parameters=MappingProxyType({**made.parameters, "up": parameter})))


@given(st.text(min_size=1, max_size=30), st.sampled_from(["axis", "tensor", "name", "title", "carrier"]))
@example("x\nimport os", "tensor")
@example('"""', "tensor")
def test_any_text_is_refused_or_stays_a_name(hostile: str, place: str) -> None:
    try:
        code = source(graph(**{place: hostile}))
    except DeriveError:
        return
    assert structure(code) == structure(source(graph()))


@given(st.text(max_size=40))
@example('"')
@example("\\")
@example("\u2028")
def test_any_prose_is_refused_or_stays_prose(prose: str) -> None:
    try:
        code = f'"""A {text.line(prose)}."""\n# {text.line(prose)}\nx = {text.quoted(prose)}\n'
    except DeriveError:
        return
    body = ast.parse(code).body
    assert len(body) == 2
    assert ast.literal_eval(body[1].value) == prose  # type: ignore[attr-defined]


def test_a_symbolic_scaling_has_no_numbers() -> None:
    with pytest.raises(DeriveError, match="symbolic"):
        render.render(Request("gated_deltanet", scaling="mixed"))


def test_a_target_that_there_is_not() -> None:
    with pytest.raises(DeriveError, match="target"):
        render.render(Request("mlp"), "keras")
