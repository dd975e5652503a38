"""Which sums one channel carries: a model followed whole, products that are known, and what rules make of it."""

from random import Random
from statistics import median

import pytest
from sympy import Rational

from widthwise.derive import Builder, architecture, derive
from widthwise.derive.carrier import CHANNELS, power, share
from widthwise.derive.channels import carried, channels
from widthwise.derive.exponents import HALF
from widthwise.derive.laws import NORMAL, ONES, TAPS, log_uniform
from widthwise.derive.product import Applied, Factor, Product, product
from widthwise.derive.proof import proof_lines
from widthwise.derive.table import RuleTable

A, B, C, D = (Factor(name, name, NORMAL) for name in "abcd")
TAP, GAIN = Factor("tap", "tap", TAPS), Factor("gain", "gain", ONES)
MIXER = {"v_proj", "v_conv1d", "g_proj", "o_proj"}
KEYS = {"q_proj", "q_conv1d", "k_proj", "k_conv1d"}
MLP = {"gate_proj", "up_proj", "down_proj"}


def by_silu(*parts: Factor) -> Applied:
    return Applied("silu", product(*parts))


def rates(table: RuleTable) -> dict[str, object]:
    return {rule.role: rule.lr for rule in table.rules if rule.lr is not None}


@pytest.mark.parametrize("many", [3, 4])
def test_a_model_followed_whole_has_the_same_share(many: int) -> None:
    """All channels together by small steps, until their mean has risen by one; 24 channels, draws of this test."""
    draw, shares = Random(7).gauss, []
    for _ in range(15):
        x = [[draw(0, 1) for _ in range(many)] for _ in range(24)]

        def read(x: list[list[float]]) -> tuple[list[float], list[list[float]]]:
            slopes = []
            for each in x:
                slope = []
                for place in range(many):
                    rest = 1.0
                    for other in range(many):
                        rest *= each[other] if other != place else 1.0
                    slope.append(rest)
                slopes.append(slope)
            return [each[0] * slope[0] for each, slope in zip(x, slopes, strict=True)], slopes

        first, slopes = read(x)
        rises = [0.0] * len(x)
        while sum(rises) < len(x):
            step = 0.01 / max(
                abs(by) / (0.3 + abs(at)) for e, s in zip(x, slopes, strict=True) for at, by in zip(e, s, strict=True)
            )
            x = [[at + step * by for at, by in zip(e, s, strict=True)] for e, s in zip(x, slopes, strict=True)]
            values, slopes = read(x)
            rises = [value - before for value, before in zip(values, first, strict=True)]
        shares.append(max(rises) / sum(rises))
    product_of_all = product(*(A, B, C, D)[:many])
    assert share(product_of_all, 24) == pytest.approx(median(shares), abs=0.12)


@pytest.mark.parametrize(
    ("tree", "asked"),
    [
        (product(by_silu(A, TAP), by_silu(B, Factor("too", "too", TAPS))), -HALF),  # q·k
        (product(by_silu(A, TAP), by_silu(B), C), -HALF),  # behind W_o
        (product(by_silu(A, TAP), by_silu(B), C, GAIN), -Rational(3, 5)),
        (product(by_silu(A), B, C), 0),  # the MLP
        (product(A, B, C), 0),
        (product(A, B), 0),
        (product(Applied("sigmoid", product(A)), B, C), 0),
        (product(GAIN, Factor("x", "x", ONES), Factor("y", "y", ONES)), 0),  # all channels are one channel
        (product(), 0),
    ],
)
def test_products_that_one_carries(tree: Product, asked: object) -> None:
    assert power(tree) == asked


def test_more_factors_leave_the_sum_to_fewer() -> None:
    many = [product(*(Factor(str(each), str(each), NORMAL) for each in range(count))) for count in (2, 3, 4, 5, 8)]
    shares = [share(tree) for tree in many]
    assert shares == sorted(shares)
    assert shares[0] < 0.05 < 0.75 < shares[-1]
    assert share(many[1], 4 * CHANNELS) < share(many[1])


@pytest.mark.parametrize(
    "tree",
    [
        product(Applied("exp", product(Applied("exp", product(A)))), B),
        product(Applied("exp", product(Factor("wide", "wide", log_uniform(1e-30, 1e30)))), A, B),
        product(*[A] * 20, B),
        product(*(Applied("relu", product(Factor(name, name, NORMAL))) for name in map(str, range(10)))),
    ],
)
def test_steep_ones_overflow_nothing_and_those_at_rest_carry_nothing(tree: Product) -> None:
    assert 0 <= share(tree) <= 1
    assert -1 <= power(tree) <= 0


@pytest.mark.parametrize("regime", ["practical", "asymptotic", "throughout"])
@pytest.mark.parametrize(("scaling", "gain"), [("heads-fixed", {"o_norm"}), ("head-dim-fixed", set()), ("mixed", None)])
def test_rules_of_gated_deltanet(scaling: str, gain: set[str] | None, regime: str) -> None:
    """As typical, but for the mixer's products: n^-1/2, behind W_o n^-3/5 where the gain is a factor of its own."""
    graph = architecture("gated_deltanet", scaling=scaling)
    typical = rates(derive(graph, "sgd", regime="asymptotic" if regime == "asymptotic" else "practical"))
    table = derive(graph, "sgd", "carrying-channel", regime=regime)
    found = rates(table)
    factors = set(carried(graph))
    assert factors >= MIXER | KEYS
    assert not factors & MLP
    if gain is not None:
        assert factors == MIXER | KEYS | gain
        behind = -Rational(3, 5) if gain else -HALF
        for role in factors:
            assert found[role] == typical[role] + (-HALF if role in KEYS else behind), role
    for rule in table.rules:
        assert rule.lr is None or rule.weight_decay == -rule.lr
        assert (rule.lr_log is not None) == (rule.role in MLP)
    assert {(each.kind, each.where) for each in table.findings}.isdisjoint({("norm-outgrown", "o"), ("step-size", "o")})


def test_a_hold_of_the_norm_is_not_slowed_again() -> None:
    """q·k is held to what it is before it is aligned, and to the channel that carries it after that: not to both."""
    graph = architecture("gated_deltanet")
    lasting = derive(graph, "sgd", "carrying-channel", regime="throughout")
    typical = derive(graph, "sgd", regime="throughout")
    assert {lasting.rule(role).lr - typical.rule(role).lr for role in KEYS} == {0}
    assert lasting.rule("q_proj").lr == -HALF


def test_steps_of_their_own_size_and_rates_fixed_by_hand_are_not_slowed() -> None:
    graph = architecture("gated_deltanet")
    assert rates(derive(graph, "adamw", "carrying-channel")) == rates(derive(graph, "adamw"))
    table = derive(graph, "sgd", "carrying-channel", fix={"v_proj.lr": "-1/4"})
    assert table.rule("v_proj").lr == -Rational(1, 4)
    assert table.rule("v_proj").lr_log is None
    assert table.rule("v_conv1d").lr == Rational(2, 5)


def test_the_proof_says_what_is_assumed() -> None:
    table = derive(architecture("gated_deltanet"), "sgd", "carrying-channel")
    assert "one that gets away carries what training adds to their sum" in table.rule("o_proj").binding
    assert "products of trained factors: carrying channel" in table.rule("o_proj").assumed
    assert "products of trained factors: first channel" in table.rule("up_proj").assumed
    assert any("curvature along it is n^3/5 larger" in line for line in proof_lines(table, "o_proj"))
    assert not [each for each in table.findings if each.kind == "largest-channel"]


def test_it_is_the_channels_number_that_is_a_power_of_n() -> None:
    """Channels that grow as n^1/2 leave half of the exponent, and of two sums the one that asks more decides."""
    g = Builder("slowly")
    n, slow = g.dim("n", 1), g.dim("slow", HALF)
    x = g.linear(g.input("x", g.dim("features")), "first", n)

    def gated(size: object, gain: bool, name: str) -> str:
        value = g.pointwise("silu", g.product(g.linear(x, f"{name}_v", size), g.parameter(f"{name}_tap", size)))
        value = g.product(value, g.pointwise("silu", g.linear(x, f"{name}_g", size)))
        return g.linear(g.product(value, g.parameter(f"{name}_gain", size, law=ONES)) if gain else value, name, n)

    y = g.add(gated(slow, False, "few"), gated(n, True, "many"))
    g.cross_entropy(g.readout(y, "head", g.dim("classes")))
    graph = g.build()
    asked = {role: each.power for role, each in carried(graph).items()}
    assert asked == dict.fromkeys(("few", "few_v", "few_tap", "few_g"), -Rational(1, 4)) | dict.fromkeys(
        ("many", "many_v", "many_tap", "many_g", "many_gain"), -Rational(3, 5)
    )
    assert [str(each.axes) for each in channels(graph) if each.carried] == ["slow", "n"]
