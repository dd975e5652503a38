"""Which sums one channel carries: a model followed whole, products that are known, and what rules make of it."""

from collections.abc import Iterator, Sequence
from random import Random
from statistics import median

import pytest
from sympy import Expr, Min, Rational, Symbol

from widthwise.derive import Builder, architecture, derive
from widthwise.derive.carrier import ASKED, _Path, power, share
from widthwise.derive.channels import carried, channels, slower
from widthwise.derive.exponents import HALF, ONE, ZERO
from widthwise.derive.flow import Flow, Place
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
    assert share(many[1], 4 * ASKED) < share(many[1])


@pytest.mark.parametrize(
    "tree",
    [
        product(Applied("exp", product(Applied("exp", product(A)))), B),
        product(Applied("exp", product(Factor("wide", "wide", log_uniform(1e-30, 1e30)))), A, B),
        product(*[A] * 20, B),
        product(Applied("exp", product(Applied("exp", product(A))))),
        product(Applied("exp", product(A)), Applied("exp", product(A))),
    ],
)
def test_steep_ones_overflow_nothing(tree: Product) -> None:
    """Nor is a rate ever raised: of an exponential its factors count, and one is no reason to."""
    assert 0 <= share(tree) <= 1
    assert -1 < power(tree) <= 0


def test_a_path_never_falls() -> None:
    """Steps of a steep flow may overshoot."""

    class Steep(Flow):
        def at(self, x: Sequence[float]) -> tuple[float, list[float]]:
            return 0.0, [1.0]

        def follow(self, x: Sequence[float]) -> Iterator[Place]:
            for time, value in enumerate((0.0, 4.0, 1.0, 6.0, 14.0)):
                yield Place(float(time), x, value, [1.0], 1.0)

    path = _Path.of(Steep(product(A), {"a": 0}, 1), [0.0], 10.0, 100.0)
    assert path.rises == (0.0, 0.0, 4.0, 4.0, 6.0, 10.0)
    assert path.times[-1] == pytest.approx(3.5)
    assert [path.rise(time) for time in (0.5, 1.5, 2.5, 9.0)] == pytest.approx([2.0, 4.0, 5.0, 10.0])


def test_those_at_rest_carry_nothing() -> None:
    """Ten relus in a row: of most models no channel begins with none of them at zero, and the sum never rises."""
    tree = product(*(Applied("relu", product(Factor(name, name, NORMAL))) for name in map(str, range(10))))
    assert share(tree) == 0.0
    assert power(tree) == 0


@pytest.mark.parametrize("regime", ["practical", "asymptotic", "throughout"])
@pytest.mark.parametrize(
    ("scaling", "gain", "keys"),
    [("heads-fixed", {"o_norm"}, -HALF), ("head-dim-fixed", set(), ZERO), ("mixed", set(), -Symbol("h") / 2)],
)
def test_rules_of_gated_deltanet(scaling: str, gain: set[str], keys: Expr, regime: str) -> None:
    """As typical, but for the mixer's products: behind W_o n^-1/2, n^-3/5 where the gain is a factor of its own, and
    for q·k a power of the terms that a head sums; by powers of ln N where many channels share a sum."""
    graph = architecture("gated_deltanet", scaling=scaling)
    typical = rates(derive(graph, "sgd", regime="asymptotic" if regime == "asymptotic" else "practical"))
    table = derive(graph, "sgd", "carrying-channel", regime=regime)
    asked = {role: each.power for role, each in carried(graph).items()}
    held = dict.fromkeys(KEYS, keys) if keys != ZERO else {}
    assert asked == held | dict.fromkeys(MIXER | gain, -Rational(3, 5) if gain else -HALF)
    assert all(table.rule(role).lr == typical[role] + power for role, power in asked.items())
    first = {role: each.power for role, each in slower(graph, integrate=regime != "asymptotic").items()}
    for rule in table.rules:
        assert rule.lr is None or rule.weight_decay == -rule.lr
        assert rule.lr_log == (None if rule.role in asked else first.get(rule.role))
    assert not {"norm-outgrown", "step-size"} & {each.kind for each in table.findings}


def test_a_hold_of_the_norm_is_not_slowed_again() -> None:
    """q·k is held to what it is before it is aligned, and to the channel that carries it after that: not to both."""
    graph = architecture("gated_deltanet")
    lasting = derive(graph, "sgd", "carrying-channel", regime="throughout")
    typical = derive(graph, "sgd", regime="throughout")
    assert {lasting.rule(role).lr - typical.rule(role).lr for role in KEYS} == {0}
    assert lasting.rule("q_proj").lr == -HALF


def test_where_heads_multiply_no_term_carries_what_they_all_sum() -> None:
    """A head's q·k has as many terms at every width; all heads' terms compete to be the first, which is another law."""
    graph = architecture("gated_deltanet", scaling="head-dim-fixed")
    (keys,) = (each for each in channels(graph) if set(each.roles) == KEYS)
    assert (str(keys.axes), str(keys.summed)) == ("H*d_k", "d_k")
    assert keys.carried == 0
    table = derive(graph, "sgd", "carrying-channel")
    assert (table.rule("q_proj").lr, table.rule("q_proj").lr_log) == (0, keys.integrated)


def test_steps_of_their_own_size_and_rates_fixed_by_hand_are_not_slowed() -> None:
    graph = architecture("gated_deltanet")
    assert rates(derive(graph, "adamw", "carrying-channel")) == rates(derive(graph, "adamw"))
    table = derive(graph, "sgd", "carrying-channel", fix={"v_proj.lr": "-1/4"})
    assert table.rule("v_proj").lr == -Rational(1, 4)
    assert table.rule("v_proj").lr_log is None
    assert table.rule("v_conv1d").lr == Rational(2, 5)


def test_the_proof_says_what_is_assumed() -> None:
    table = derive(architecture("gated_deltanet"), "sgd", "carrying-channel")
    assert (
        "of those that are summed, along H*d_v, the one that gets away carries what training adds"
        in table.rule("o_proj").binding
    )
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


def test_a_role_in_two_sums_is_held_for_both() -> None:
    """Whichever comes first, of powers that cannot be compared too."""
    h = Symbol("h")
    for order in (1, -1):
        g = Builder("both")
        one, other, n = g.dim("one", h), g.dim("other", ONE - h), g.dim("n", 1)
        x = g.linear(g.input("x", g.dim("features")), "first", n)
        taps, gate = (g.reshape(g.linear(x, name, one * other), one, other) for name in ("v", "gate"))
        value = g.product(g.pointwise("silu", g.product(taps, g.pointwise("silu", gate))), gate)
        sums = [
            g.reshape(g.contract(value, g.parameter(name, axis), kept), kept)
            for name, axis, kept in (("over_one", one, other), ("over_other", other, one))
        ][::order]
        y = g.add(*(g.linear(each, f"out_{index}", n) for index, each in enumerate(sums)))
        g.cross_entropy(g.readout(y, "head", g.dim("classes")))
        asked = {role: each.power for role, each in carried(g.build()).items()}
        assert asked["v"] == asked["gate"] == Min(-h / 2, h / 2 - HALF)
        assert (asked["over_one"], asked["over_other"]) == (-h / 2, h / 2 - HALF)
