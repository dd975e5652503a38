"""Predictions that are not the rules' own: sizes at initialization, before training has raised anything."""

import pytest

from widthwise.derive import Builder, Graph, architecture, derive
from widthwise.verify.coord.check import coordinate_check
from widthwise.verify.coord.described import Described
from widthwise.verify.coord.predict import follows_gradient, predictions

WIDTHS, BASE = (64, 256, 1024), 16  # where gates are small already


def gated_twice() -> Graph:
    """Few outputs b, c, which open a gate together: both start at n^-1/2 and are brought to n^0."""
    g = Builder("gated_twice")
    n, few = g.dim("n", 1), g.dim("few")
    x = g.embedding("table", g.dim("vocab"), n, output="x")
    h = g.norm(x, output="h")
    b, c = (g.linear(h, name, few, bias=True, output=f"z_{name}") for name in ("b", "c"))
    gate = g.product(b, c, output="gate")
    y = g.linear(g.product(g.linear(h, "v", n), gate, n), "o", n, output="z_o")
    g.cross_entropy(g.readout(g.norm(g.residual(x, y)), "head", g.dim("vocab")))
    return g.build()


def test_gradients_are_predicted_with_initial_sizes() -> None:
    graph = gated_twice()
    predicted = {each.key: each for each in predictions(graph, derive(graph, "adamw"))}
    assert predicted["weight gradient", "b"].exponent == -1.0
    assert predicted["weight gradient", "b_bias"].exponent == -1.0
    assert predicted["own step", "b in linear(h, b)"].least is None  # a sign has one size, whatever the gradient has
    assert predicted["step", "b"].exponent == -1.0


def test_rates_that_hold_throughout_are_predicted_to_step_by_less() -> None:
    graph = architecture("gated_deltanet")
    early, whole = (
        {each.key: each for each in predictions(graph, derive(graph, "sgd", regime=regime))}
        for regime in ("practical", "throughout")
    )
    assert early.keys() == whole.keys()
    slower = {name for kind, name in early if kind == "own step" and whole[kind, name] != early[kind, name]}
    assert {name.split(" ")[0] for name in slower} == {
        *("q_proj", "q_conv1d", "k_proj", "k_conv1d"),
        *("a_proj", "b_proj", "A_log", "dt_bias"),
    }
    assert {whole["own step", name].exponent - early["own step", name].exponent for name in slower} == {-0.5}
    assert all(whole["forward", name] == early["forward", name] for kind, name in early if kind == "forward")


def test_steps_that_follow_the_gradient_start_smaller() -> None:
    graph = gated_twice()
    own = {each.name: each for each in predictions(graph, derive(graph, "sgd")) if each.kind == "own step"}
    assert (own["b in linear(h, b)"].least, own["b in linear(h, b)"].exponent) == (-0.5, 0.0)
    assert own["o in z_o"].least is not None
    assert own["table in x"].least is None


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_they_are_what_is_measured(optimizer: str) -> None:
    graph = gated_twice()
    table = derive(graph, optimizer)
    report = coordinate_check(
        Described(graph, table, BASE, sizes={"few": 1}),
        predictions(graph, table),
        WIDTHS,
        seeds=range(4),
        steps=1,
        follows_gradient=follows_gradient(optimizer),
    )
    assert report.passed, report.findings
    found = {(each.kind, each.name): each.slope.value for each in report.results}
    assert found["weight gradient", "b"] == pytest.approx(-1.0, abs=0.2)
