"""Dense convolutions, broadcasts and experts: the rules of linear maps, with taps, places and experts beside."""

import pytest

from widthwise.derive import Builder, Graph, derive
from widthwise.derive.errors import DeriveError
from widthwise.derive.graph import Parameter, as_group
from widthwise.derive.laws import NORMAL

KNOBS = ("init_std", "multiplier", "lr", "weight_decay", "eps")


def two_layers(dense: bool) -> Graph:
    """A hidden layer from n to n: a linear map, or a convolution with taps at every place."""
    g = Builder("layers")
    n, taps, places = g.dim("n", 1), g.dim("taps"), g.dim("places")
    x = g.pointwise("relu", g.linear(g.input("x", g.dim("features")), "first", n))
    if dense:
        weight = g._parameter("second", (as_group(n), as_group(n), as_group(taps)), NORMAL)
        y = g.op("convolution", g.op("broadcast", x, shape=(as_group(n), as_group(places))), weight)
        y = g.reshape(y, n * places)
    else:
        y = g.linear(x, "second", n)
        y = g.reshape(g.op("broadcast", y, shape=(as_group(n), as_group(places))), n * places)
    g.cross_entropy(g.readout(g.pointwise("relu", y), "out", g.dim("classes")))
    return g.build()


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon", "adafactor", "lion"])
@pytest.mark.parametrize("assume", ["at-init", "aligned", "unaligned"])
def test_a_convolution_has_the_rule_of_a_linear_map(optimizer: str, assume: str) -> None:
    one, two = (derive(two_layers(dense), optimizer, assume) for dense in (True, False))
    for role in ("first", "second", "out"):
        assert [getattr(one.rule(role), k) for k in KNOBS] == [getattr(two.rule(role), k) for k in KNOBS], role
    assert one.rule("second").init_std != 0


def test_shapes_are_checked() -> None:
    g = Builder("wrong")
    n, m, taps = g.dim("n", 1), g.dim("m", 1), g.dim("taps")
    weight = g._parameter("w", (as_group(n), as_group(m), as_group(taps)), NORMAL)
    with pytest.raises(DeriveError, match=r"a convolution of \[n, m, taps\] cannot take \[n\]"):
        g.op("convolution", g.input("x", n), weight)
    with pytest.raises(DeriveError, match=r"cannot broadcast \[n\] to \[m\]"):
        g.op("broadcast", g.input("y", n), shape=(as_group(m),))


def test_the_gradient_of_a_broadcast_sums_over_new_axes() -> None:
    """A bias of one entry added to n units meets n gradients; that of n units meets one each."""
    g = Builder("shared")
    n = g.dim("n", 1)
    x = g.linear(g.input("x", g.dim("features")), "first", n)
    shift = g.op("broadcast", g.parameter("shift"), shape=(as_group(n),))
    g.cross_entropy(g.readout(g.pointwise("relu", g.add(x, shift)), "out", g.dim("classes")))
    table = derive(g.build(), "sgd")
    assert table.rule("shift").lr < table.rule("first").lr


def test_experts() -> None:
    def graph(growing: int) -> Graph:
        g = Builder("experts")
        n, ffn, experts = g.dim("n", 1), g.dim("ffn", 1), g.dim("experts", growing)
        x = g.linear(g.input("x", g.dim("features")), "first", n)
        weight = g._parameter("up", (as_group(experts), as_group(ffn), as_group(n)), NORMAL)
        y = g.pointwise("silu", g.op("linear", x, weight, experts=True))
        g.cross_entropy(g.readout(y, "out", g.dim("classes")))
        return g.build()

    assert derive(graph(0)).rule("up").lr == -1
    with pytest.raises(DeriveError, match="the number of experts experts grows"):
        graph(1)


def test_fields_have_defaults() -> None:
    assert Parameter("role", ()).rows is None
