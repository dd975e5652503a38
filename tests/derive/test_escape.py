"""How much sooner the first of N products gets away: known limits, an integral done otherwise, and who is counted."""

import math
import random
from collections.abc import Callable

import pytest
from sympy import Rational

from widthwise.derive import Builder, DeriveError, architecture, derive
from widthwise.derive.channels import channels, slower
from widthwise.derive.escape import CHANNELS, _away_by, _beyond, _radius, exponent, first_away, limit, power
from widthwise.derive.flow import Flow
from widthwise.derive.laws import NORMAL, ONES, TAPS, ZEROS, Law, begins, inverse_softplus, log_uniform
from widthwise.derive.product import Applied, Factor, Product, product


def normal(*names: str) -> tuple[Factor, ...]:
    return tuple(Factor(name, name, NORMAL) for name in names)


A, B, C, D, E = normal(*"abcde")
MLP = product(A, Applied("silu", product(B)), C)


@pytest.mark.parametrize("many", [3, 4, 5, 8, 12])
def test_without_functions_it_is_what_counting_says(many: int) -> None:
    """-(p-2)/2 as N grows; a million plain draws of eight and twelve factors have -2.54 and -3.68 from 256 to 4096."""
    tree = product(*(Factor(name, name, NORMAL) for name in map(str, range(many))))
    drawn = {8: -2.54, 12: -3.68}.get(many, -(many - 2) / 2)
    assert exponent(tree, *CHANNELS) == pytest.approx(drawn, rel=0.08 if many < 8 else 0.03)
    assert limit(tree) == Rational(2 - many, 2)


@pytest.mark.parametrize("dimensions", [1, 2, 3, 4, 7])
def test_radii_beyond_which_draws_lie(dimensions: int) -> None:
    """P(χ > r), against its density summed."""
    width, radius = 0.01, 2.5
    density = [
        at ** (dimensions - 1) * math.exp(-at * at / 2) for at in (width * (index + 0.5) for index in range(1500))
    ]
    assert _beyond(radius, dimensions) == pytest.approx(sum(density[250:]) / sum(density), rel=1e-4)
    assert _beyond(_radius(0.01, dimensions), dimensions) == pytest.approx(0.01)


def test_a_draw_may_have_to_come_from_near() -> None:
    """Of a direction not away from 6, by 0.1 from 3 and by 0.4 from 2, what lies from √6 to √18 is away by 0.2."""
    ray = ((math.log(6), math.inf), (math.log(3), math.log(0.1)), (math.log(2), math.log(0.4)))
    between = _beyond(math.sqrt(6), 3) - _beyond(math.sqrt(18), 3)
    assert _away_by(math.log(0.2), ray, 3) == pytest.approx(between)
    assert _away_by(math.log(0.05), ray, 3) == 0


def test_where_it_begins_far_out_is_seen_as_it_is() -> None:
    """x = (68, 1, 1): all squares grow by 2s, with ds = f dt."""
    flow = Flow.of(product(A, B, C))
    total, s, step = 0.0, 0.0, 1e-4
    while s < 1e7:
        x, y = math.sqrt(68**2 + 2 * s), math.sqrt(1 + 2 * s)
        total, s, step = total + step / (x * y * y), s + step, step * 1.0005
    assert flow.away([68.0, 1.0, 1.0], 10.0) == pytest.approx(total, rel=0.1)


def test_three_factors_take_as_long_as_an_elliptic_integral_says() -> None:
    """All squares grow alike, x_i² = c_i + y with dy/dt = 2 √Π(c_i + y): the time to infinity is an integral of one
    variable, of draws that this test makes itself."""
    draw = random.Random(0)

    def time() -> float:
        low, middle, high = sorted(draw.gauss(0, 1) ** 2 for _ in range(3))
        if draw.random() < 0.5:  # of an odd number of negative factors: it shrinks to zero first, and escapes later
            return math.inf
        steps, total = 400, 0.0
        for index in range(steps):  # y = -low + tan², so that the integrand is smooth
            z = math.tan((index + 0.5) / steps * math.pi / 2)
            y = z * z
            if y >= low:
                total += (1 + y) / math.sqrt((y + middle - low) * (y + high - low)) * math.pi / 2 / steps
        return total

    times = sorted(time() for _ in range(8_000))
    for several in (8, 32):  # that few shrinking ones come before
        measured = times[round(len(times) * (1 - 0.5 ** (1 / several)))]
        assert first_away(product(A, B, C), several) == pytest.approx(measured, rel=0.05)


def test_silu_makes_the_first_channel_come_sooner_and_a_gain_at_one_is_a_factor() -> None:
    v, gate = Applied("silu", product(A, Factor("taps", "taps", TAPS))), Applied("silu", product(B))
    without = power(product(v, gate, C))
    assert power(product(A, D, B, C)) > without
    assert power(product(v, gate, C, Factor("gain", "gain", ONES))) < without


@pytest.mark.parametrize(
    "tree",
    [
        product(A, B),
        product(Applied("silu", product(A)), B),
        product(Applied("sigmoid", product(A)), B, C),
        product(Applied("tanh", product(A, B)), C),
        product(),
    ],
)
def test_what_takes_forever_asks_nothing(tree: Product) -> None:
    assert power(tree) == limit(tree) == 0


def test_where_few_models_have_one_that_gets_away_factors_are_counted() -> None:
    """Ten relus in a row: one channel of 1024 begins with none of them at zero."""
    tree = product(*(Applied("relu", product(Factor(name, name, NORMAL))) for name in map(str, range(10))))
    assert exponent(tree, *CHANNELS) is None
    assert power(tree) == limit(tree) == -4


@pytest.mark.parametrize(
    "tree",
    [
        product(Applied("exp", product(Applied("exp", product(A)))), B),
        product(Applied("exp", product(A, B, C))),
        product(Applied("exp", product(Factor("wide", "wide", log_uniform(1e-30, 1e30)))), A, B),
        product(*[A] * 20, B),
    ],
)
def test_steep_ones_overflow_nothing(tree: Product) -> None:
    assert power(tree) <= 0


def test_a_saturating_gate_counts_for_less_than_a_factor() -> None:
    gated = product(Applied("sigmoid", product(A)), B, C, D)
    assert power(product(A, B, C, D)) < power(gated) < 0


def test_an_exponential_gets_away() -> None:
    assert power(product(Applied("exp", product(A)), B)) < 0


def test_what_begins_at_zero_or_at_rest() -> None:
    """Two factors that begin at zero do not move; one does."""
    zero, other = (Factor(name, name, ZEROS) for name in ("zero", "other"))
    assert power(product(A, B, zero)) < 0
    assert power(product(A, zero, other)) == 0
    still = product(*(Factor(name, name, ONES) for name in "xyz"))
    assert power(still) == 0  # all channels are one channel


def test_names_and_order_do_not_matter_but_which_factor_is_which_does() -> None:
    assert exponent(product(Applied("silu", product(E)), B, D), *CHANNELS) == exponent(MLP, *CHANNELS)
    alike = product(A, Applied("silu", product(A)), A)
    assert first_away(alike, CHANNELS[0]) != pytest.approx(first_away(MLP, CHANNELS[0]), rel=0.1)


@pytest.mark.parametrize(
    ("scaling", "at", "drawn"),
    [
        ("heads-fixed", "y", -1.81),
        ("head-dim-fixed", "y", -1.44),
        ("heads-fixed", "o", -1.27),
        ("heads-fixed", "mlp_out", -0.61),
    ],
)
def test_products_of_gated_deltanet(scaling: str, at: str, drawn: float) -> None:
    """As several rotations of the directions, with more of them, have it (the rule's rounding rests on it)."""
    (tree,) = (each.product for each in channels(architecture("gated_deltanet", scaling=scaling)) if each.at == at)
    assert exponent(tree, *CHANNELS) == pytest.approx(drawn, abs=0.025)


@pytest.mark.parametrize("scaling", ["heads-fixed", "head-dim-fixed"])
def test_the_mixer_gets_away_sooner_than_its_factors_tell(scaling: str) -> None:
    graph = architecture("gated_deltanet", scaling=scaling)
    counted, integrated = (
        {role: asked.power for role, asked in slower(graph, integrate=integrate).items()} for integrate in (False, True)
    )
    assert counted.keys() == integrated.keys()
    assert all(integrated[role] < counted[role] for role in counted)
    assert all(isinstance(value, Rational) for value in integrated.values())


def test_rules_have_it_and_past_the_crossovers_the_count() -> None:
    graph = architecture("gated_deltanet")
    tables = {
        (assume, regime): {
            rule.role: rule.lr_log for rule in derive(graph, "sgd", assume, regime=regime).rules if rule.lr_log
        }
        for assume in ("largest-channel", "first-channel")
        for regime in ("practical", "asymptotic", "throughout")
    }
    (product_of_v,) = (each for each in channels(graph) if each.at == "y")
    for regime in ("practical", "throughout"):
        assert tables["first-channel", regime]["o_proj"] == product_of_v.integrated != product_of_v.counted
        assert tables["first-channel", regime].keys() == tables["largest-channel", regime].keys()
    assert tables["first-channel", "asymptotic"] == tables["largest-channel", "asymptotic"]
    assert all(rule.lr_log is None for rule in derive(graph, "adamw", "first-channel").rules)


def test_the_same_map_of_one_tensor_is_one_factor_and_functions_are_told_apart() -> None:
    def gated(by: Callable[[Builder, str], str]) -> Product:
        g = Builder("gated")
        x = g.linear(g.input("x", g.dim("features")), "first", n := g.dim("n", 1))
        up = g.linear(x, "up", g.dim("m", 1))
        g.cross_entropy(g.readout(g.linear(g.product(up, by(g, up)), "down", n), "head", g.dim("classes")))
        return next(each.product for each in channels(g.build()) if each.roles[0] == "down")

    (down, up, again) = gated(lambda g, up: g.pointwise("silu", up)).parts
    assert isinstance(down, Factor)
    assert again == Applied("silu", product(up))
    assert isinstance(gated(lambda g, up: g.pointwise("tanh", up)).parts[2], Applied)


def test_where_laws_begin() -> None:
    assert begins(TAPS) == (0.0, pytest.approx(1 / math.sqrt(3)))
    mean, std = begins(log_uniform(1.0, 16.0))
    assert mean == pytest.approx(16 * math.log(16) / 15 - 1, abs=1e-3)
    assert 0 < std < 1
    assert begins(inverse_softplus(1, 1000))[0] == pytest.approx(144.6, rel=0.01)
    mean, std = begins(inverse_softplus(1e-3, 1e-1))
    assert mean == pytest.approx(math.log(1e-2), abs=0.05)
    assert std == pytest.approx(math.log(100) / math.sqrt(12), rel=0.05)


@pytest.mark.parametrize(
    ("law", "ends"),
    [("log_uniform", (-1, 1)), ("inverse_softplus", (0, 1)), ("log_uniform", (1, math.nan)), ("mine", ())],
)
def test_laws_that_there_are_not(law: str, ends: tuple[float, ...]) -> None:
    with pytest.raises(DeriveError, match="law"):
        Law(law, False, *ends)
