"""Every way to describe or ask for something impossible ends in one DeriveError: what, where, what to do."""

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import pytest
from sympy import Float

from widthwise.derive import Builder, DeriveError, Graph, architecture, derive
from widthwise.derive.graph import Node
from widthwise.derive.laws import NORMAL


def builder() -> Builder:
    return Builder("broken")


def test_shape_errors_point_at_the_callers_line() -> None:
    g = builder()
    x = g.input("x", g.dim("F"))
    other = g.linear(x, "w", g.dim("n", 1))
    with pytest.raises(DeriveError) as error:
        g.add(x, other)  # this line
    assert error.value.where.startswith("add at test_errors.py:")
    line = int(error.value.where.rsplit(":", 1)[1])
    with open(__file__, encoding="utf-8") as source:
        assert "# this line" in source.read().splitlines()[line - 1]
    assert error.value.cure


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda g, x: g.op("fft", x), "no op 'fft'"),
        (lambda g, x: g.linear(x, "not a name", g.dim("n", 1)), "not a dotted name"),
        (lambda g, x: g.linear(x, "evil'; import os", g.dim("n", 1)), "not a dotted name"),
        (lambda g, x: (g.linear(x, "w", g.dim("n", 1)), g.linear(x, "w", g.dim("n", 1))), "taken"),
        (lambda g, x: g.dim("F", 1), "declared twice"),
        (lambda g, x: g.dim("m", 0.5), "not exact"),
        (lambda g, x: g.dim("m", "__import__('os')"), "not an exponent"),
        (lambda g, x: g.reshape(x, g.dim("n", 1)), "cannot view"),
        (lambda g, x: g.readout(x, "head", g.dim("V"), tied_to="embeddings"), "no parameter"),
        (lambda g, x: g.repeat("layers", 0, lambda y: y, x), "repeated 0 times"),
        (lambda g, x: g.repeat("layers", 2, lambda y: g.linear(y, "w", g.dim("n", 1)), x), "cannot repeat"),
        (lambda g, x: g.contract(x, x, g.dim("n", 1)), "has no axis"),
        (lambda g, x: g.norm(Builder("other").input("x", g.dim("n", 1))), "not part of this description"),
        (lambda g, x: g.build(), "no loss"),
    ],
)
def test_builder_refuses(wrong: Callable, says: str) -> None:
    g = builder()
    x = g.input("x", g.dim("F"))
    with pytest.raises(DeriveError, match=says) as error:
        wrong(g, x)
    assert error.value.cure


def graph(*nodes: Node) -> Graph:
    return Graph("raw", nodes, MappingProxyType({}), MappingProxyType({}), ())


def test_cycles_unknown_ops_and_missing_tensors() -> None:
    with pytest.raises(DeriveError, match="cycle through"):
        _ = graph(Node("add", ("b", "b"), "a", ()), Node("add", ("a", "a"), "b", ())).ordered
    with pytest.raises(DeriveError, match="nothing makes"):
        _ = graph(Node("add", ("b", "b"), "a", ())).ordered
    with pytest.raises(DeriveError, match="made twice"):
        _ = graph(Node("input", (), "a", ()), Node("input", (), "a", ())).ordered
    with pytest.raises(DeriveError, match="no rule for op 'mystery'"):
        derive(graph(Node("mystery", (), "a", (), where="model.py:7")))


def test_a_parameter_that_nothing_bounds() -> None:
    g = builder()
    x = g.linear(g.input("x", g.dim("F")), "w", g.dim("n", 1))
    g.linear(x, "dangling", g.dim("m", 1))
    g.cross_entropy(g.readout(x, "head", g.dim("V")))
    with pytest.raises(DeriveError, match=r"nothing bounds .* .dangling.") as error:
        derive(g.build())
    assert "test_errors.py" in error.value.where


def test_a_parameter_without_gradient() -> None:
    g = builder()
    x = g.linear(g.input("x", g.dim("F")), "w", g.dim("n", 1))
    g.pointwise("relu", g.linear(x, "dangling", g.dim("m", 1)))
    g.cross_entropy(g.readout(x, "head", g.dim("V")))
    with pytest.raises(DeriveError, match="'dangling' gets no gradient"):
        derive(g.build())


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        ({"optimizer": "adamm"}, "no optimizer"),
        ({"assume": "hopeful"}, "no assumption set"),
        ({"preset": "liu-gu-2025"}, "no preset"),
        ({"regime": "middle"}, "no regime"),
        ({"gauge": "half"}, "no gauge"),
        ({"parametrization": "sp"}, "no parametrization"),
        ({"preset": "liu-gu-2026", "assume": "aligned"}, "contradicts"),
        ({"preset": "liu-gu-2026", "regime": "asymptotic"}, "contradicts"),
        ({"assume": "unaligned", "regime": "asymptotic"}, "contradicts"),
        ({"assume": "aligned", "regime": "practical"}, "contradicts"),
        ({"fix": {"a_prj.lr": "0"}}, "no role"),
        ({"fix": {"a_proj.speed": "0"}}, "no knob"),
        ({"fix": {"a_proj.lr": "a+"}}, "not an exponent"),
        ({"fix": {"o_scale.lr": "0"}}, "has no lr"),
        ({"fix": {"o_norm.multiplier": "0"}}, "has no multiplier"),
    ],
)
def test_requests_that_cannot_be_met(request_: dict, says: str) -> None:
    with pytest.raises(DeriveError, match=says) as error:
        derive(architecture("gated_deltanet"), **request_)
    assert error.value.cure


def test_architecture_options_are_checked() -> None:
    for wrong in ({"scaling": "sideways"}, {"activation": "yes"}, {"size": 3}, {"qk_scale": "2"}):
        with pytest.raises(DeriveError):
            architecture("gated_deltanet", **wrong)


def test_fixed_knobs_that_break_a_bound_are_findings_not_silence() -> None:
    table = derive(architecture("mlp"), "adam", fix={"hidden.init_std": "0"})
    (finding,) = [each for each in table.findings if each.kind == "growth" and each.where == "z"]
    assert str(finding.exponent) == "1/2"


@pytest.mark.parametrize(("lr", "excess", "says"), [("0", "1", "grows"), ("-2", "-1", "vanishes"), ("-1", None, "")])
def test_a_fixed_learning_rate_is_judged(lr: str, excess: str | None, says: str) -> None:
    found = [
        each for each in derive(architecture("mlp"), "adam", fix={"hidden.lr": lr}).findings if each.kind == "step-size"
    ]
    assert [str(each.exponent) for each in found] == ([excess] if excess else [])
    assert all(says in each.message and each.cure == "lr n^-1" for each in found)


def test_lone_roles_and_tensors_are_looked_up_by_name() -> None:
    table = derive(architecture("mlp"))
    for wrong in (lambda: table.rule("hiden"), lambda: table.tensor("zz")):
        with pytest.raises(DeriveError, match="known: "):
            wrong()


def two_branches(**attention: str) -> None:
    g = builder()
    n, d = g.dim("n", 1), g.dim("d", 1)
    x = g.norm(g.linear(g.input("x", g.dim("F")), "first", n))
    for branch in "ab":
        q, k, v = (g.linear(x, f"{branch}_{each}", d) for each in "qkv")
        g.attention(q, k, v, **attention)


def test_a_multiplier_is_carried_once() -> None:
    with pytest.raises(DeriveError, match="'attn_scale' is carried twice"):
        two_branches()


def test_a_weight_summed_in_a_product_is_refused() -> None:
    g = builder()
    x = g.norm(g.linear(g.input("x", g.dim("F")), "first", g.dim("n", 1)))
    gate = g.pointwise("sigmoid", g.contract(x, g.parameter("w", g.dim("n", 1), law=NORMAL)))
    g.cross_entropy(g.readout(g.product(x, gate, g.dim("n", 1)), "head", g.dim("V")))
    with pytest.raises(DeriveError, match="sums the parameter 'w' over n"):
        derive(g.build())


@pytest.mark.parametrize(
    "wrong",
    [
        lambda g, x: g.op("linear", x),
        lambda g, x: g.op("reshape", x),
        lambda g, x: g.add(),
        lambda g, x: g.linear(g.contract(x, x), "w", g.dim("n", 1)),
        lambda g, x: g.norm(g.contract(x, x)),
        lambda g, x: g.norm(x, kind="batch_norm"),
        lambda g, x: g.pointwise("softmax", x),
        lambda g, x: g.pointwise("rms_norm", x),
        lambda g, x: g.dim("m", Float(0.5)),
        lambda g, x: g.dim("m", None),
    ],
)
def test_misused_ops_are_derive_errors_too(wrong: Callable) -> None:
    g = builder()
    with pytest.raises(DeriveError):
        wrong(g, g.input("x", g.dim("F")))


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("op", ["add", "product"])
def test_long_sums_do_not_take_exponential_time(optimizer: str, op: str) -> None:
    g = builder()
    x = g.linear(g.input("x", g.dim("F")), "w", g.dim("n", 1))
    for _ in range(40):
        x = getattr(g, op)(x, x)
    g.cross_entropy(g.readout(g.linear(g.norm(x), "last", g.dim("n", 1)), "head", g.dim("V")))
    assert derive(g.build(), optimizer).rule("w").lr == (0 if optimizer == "adam" else 1)
    many = " + ".join(f"s{index}" for index in range(30))
    derive(architecture("mlp"), fix={"hidden.init_std": many})


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda g, x, n: g.linear(x, "w", 128), "128 is no axis"),
        (lambda g, x, n: g.linear(x, "w", "d_model"), "'d_model' is no axis"),
        (lambda g, x, n: g.linear(None, "w", n), "None is no tensor"),
        (lambda g, x, n: g.product(None, x), "None is no tensor"),
        (lambda g, x, n: g.pointwise("silu", 3), "3 is no tensor"),
        (lambda g, x, n: g.repeat("layers", 2, lambda _: None, x), "None is no tensor"),
        (lambda g, x, n: g.parameter("gain", n, law="ones"), "'ones' is no law"),
    ],
)
def test_what_is_no_axis_tensor_or_law_is_blamed_on_the_line_that_gives_it(wrong: Any, says: str) -> None:
    g = Builder("mine")
    n = g.dim("d_model", 1)
    x = g.embedding("embed", g.dim("vocab"), n)
    with pytest.raises(DeriveError, match=rf"{says} \[test_errors.py:\d+\]"):
        wrong(g, x, n)
