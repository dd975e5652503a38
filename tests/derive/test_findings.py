"""What the engine says against its own rules: sums that are incoherent only before the first step."""

import pytest

from widthwise.derive import Builder, RuleTable, architecture, derive
from widthwise.derive.exponents import HALF, ZERO
from widthwise.derive.laws import ONES


def found(table: RuleTable, kind: str) -> dict[str, str]:
    return {each.where: each.message for each in table.findings if each.kind == kind}


def test_a_gain_shared_by_growing_heads_leaves_the_early_branch_at_once() -> None:
    graph = architecture("gated_deltanet", scaling="head-dim-fixed")
    table = derive(graph, "sgd")
    assert list(found(table, "early-branch")) == ["o_norm"]  # the gates act before a norm, which keeps them on it
    assert "first step of o_proj" in found(table, "early-branch")["o_norm"]
    (finding,) = (each for each in table.findings if each.kind == "early-branch")
    past = derive(graph, "sgd", regime="asymptotic")
    assert past.rule("o_norm").lr == ZERO != table.rule("o_norm").lr
    assert finding.cure.startswith("lr n^0 ")  # what the asymptotic branch derives, by another way
    assert finding.exponent == HALF
    assert not found(past, "early-branch")


@pytest.mark.parametrize(
    ("optimizer", "scaling"), [("adamw", "head-dim-fixed"), ("adafactor", "head-dim-fixed"), ("sgd", "heads-fixed")]
)
def test_no_rule_rests_on_it_where_steps_have_their_own_size_or_heads_do_not_grow(optimizer: str, scaling: str) -> None:
    assert not found(derive(architecture("gated_deltanet", scaling=scaling), optimizer), "early-branch")


@pytest.mark.parametrize(("normed", "where"), [(False, ["gain"]), (True, [])])
def test_a_norm_behind_the_gain_takes_the_coherent_part_away(normed: bool, where: list[str]) -> None:
    g = Builder("shared gain")
    heads, entries, width = g.dim("H", 1), g.dim("d"), g.dim("n", 1)
    wide = g.linear(g.input("x", g.dim("features")), "first", heads * entries)
    scaled = g.product(g.reshape(wide, heads, entries), g.parameter("gain", entries, law=ONES), heads, entries)
    scaled = g.reshape(scaled, heads * entries)
    out = g.linear(g.norm(scaled) if normed else scaled, "second", width)
    g.cross_entropy(g.readout(g.pointwise("relu", out), "head", g.dim("classes")))
    assert list(found(derive(g.build(), "sgd"), "early-branch")) == where


@pytest.mark.parametrize("name", ["gated_deltanet", "transformer"])
def test_a_tied_readout_meets_its_own_rows(name: str) -> None:
    table = derive(architecture(name, tied=True), "adamw")
    assert "own row of embed" in found(table, "tied-readout")["lm_head"]
    (finding,) = (each for each in table.findings if each.kind == "tied-readout")
    assert finding.exponent == HALF
    assert finding.cure == "lower the base multiplier of lm_head by n_base^1/2"
    assert not found(derive(architecture(name), "adamw"), "tied-readout")


@pytest.mark.parametrize(("skipped", "where"), [(True, ["head"]), (False, [])])
def test_rows_that_do_not_reach_the_readout_are_not_met(skipped: bool, where: list[str]) -> None:
    g = Builder("tied")
    width, vocabulary = g.dim("n", 1), g.dim("vocab")
    x = g.embedding("table", vocabulary, width)
    y = g.linear(x, "hidden", width)  # W e, which eᵀ meets as a sum of independent signs
    g.cross_entropy(g.readout(g.norm(g.residual(x, y) if skipped else y), "head", vocabulary, tied_to="table"))
    assert list(found(derive(g.build()), "tied-readout")) == where


def test_a_batch_norm_sinks_below_its_eps_as_the_others_do() -> None:
    g = Builder("small")
    width = g.dim("n", 1)
    h = g.linear(g.input("x", g.dim("features")), "first", width)
    normed = g.op("batch_norm", g.linear(h, "small", width, output="z"), eps=1e-5)
    g.cross_entropy(g.readout(normed, "head", g.dim("classes")))
    graph = g.build()
    assert not found(derive(graph), "norm-eps")
    table = derive(graph, fix={"small.init_std": "-1"})
    assert "z has size n^-1/2 in front of a norm with eps 1e-05" in found(table, "norm-eps")["z"]
