"""Norms that divide by what may be near zero, and by which power of the width the smallest falls."""

import pytest

from widthwise.derive import Builder, RuleTable, architecture, derive
from widthwise.derive.exponents import show


def tails(table: RuleTable) -> dict[str, str]:
    return {each.where: show(each.exponent) for each in table.findings if each.kind == "norm-tail"}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
@pytest.mark.parametrize(
    ("scaling", "regime", "expected"),
    [
        ("heads-fixed", "practical", {"o": "0"}),
        ("heads-fixed", "asymptotic", {}),  # SiLU's mean: q·k concentrates as d_k grows
        ("head-dim-fixed", "practical", {"o": "1"}),
        ("head-dim-fixed", "asymptotic", {"o": "1"}),  # d_k stays, and so does the spread of q·k
        ("mixed", "practical", {"o": "1 - h"}),
    ],
)
def test_the_smallest_of_the_heads_that_a_wider_model_has_more_of(
    optimizer: str, scaling: str, regime: str, expected: dict[str, str]
) -> None:
    assert tails(derive(architecture("gated_deltanet", scaling=scaling), optimizer, regime=regime)) == expected


def test_without_a_nonlinearity_no_mean_ever_keeps_the_product_from_zero() -> None:
    graph = architecture("gated_deltanet", activation=False)
    assert tails(derive(graph, "sgd", regime="asymptotic")) == {"o": "0"}


@pytest.mark.parametrize("name", ["transformer", "mlp", "mamba2"])
def test_no_scan_in_front_of_a_norm_or_something_added_to_it(name: str) -> None:
    options = {"qk_norm": True} if name == "transformer" else {}
    assert not tails(derive(architecture(name, **options), "sgd"))


@pytest.mark.parametrize("shared", [True, False])
def test_a_norm_over_all_heads_at_once_has_no_smallest_head(shared: bool) -> None:
    g = Builder("normed")
    heads, d_k, d_v, n = g.dim("H", 1), g.dim("d_k"), g.dim("d_v"), g.dim("n", 1)
    x = g.linear(g.input("x", g.dim("features")), "first", n)
    q, k, v = (
        g.reshape(g.linear(x, name, heads * size), heads, size) for name, size in (("q", d_k), ("k", d_k), ("v", d_v))
    )
    o = g.scale(g.scan(q, g.norm(k, kind="l2_norm"), v, output="o"), factor=2.0)
    y = g.norm(g.reshape(o, heads * d_v), "gain") if shared else g.reshape(g.norm(o, "gain"), heads * d_v)
    g.cross_entropy(g.readout(g.linear(y, "last", n), "head", g.dim("classes")))
    assert tails(derive(g.build(), "adamw")) == {"o": "0" if shared else "1"}
