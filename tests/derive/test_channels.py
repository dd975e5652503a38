"""Channels in which trained factors multiply: how many there are, and what the largest channel does to them."""

import pytest

from widthwise.derive import Builder, DeriveError, RuleTable, architecture, derive, read_toml, write_toml
from widthwise.derive.channels import channels, slower
from widthwise.derive.exponents import HALF, ONE
from widthwise.derive.graph import as_group
from widthwise.derive.laws import NORMAL
from widthwise.derive.product import Applied
from widthwise.derive.proof import proof_lines
from widthwise.derive.render import latex_table


def summed(name: str, **options: object) -> dict[str, set[str]]:
    """The factors behind each sum in which more than two multiply, by the axes of the channels."""
    return {str(each.axes): set(each.roles) for each in channels(architecture(name, **options)) if each.counted != 0}


def found(table: RuleTable) -> list[str]:
    return [each.where for each in table.findings if each.kind == "largest-channel"]


def test_factors_of_the_mixer_are_counted_back_to_the_linear_maps() -> None:
    assert summed("gated_deltanet") == {
        "H*d_k": {"q_proj", "q_conv1d", "k_proj", "k_conv1d"},
        "H*d_v": {"v_proj", "v_conv1d", "o_norm", "g_proj", "o_proj"},
        "ffn": {"gate_proj", "up_proj", "down_proj"},
    }
    assert {role: each.power for role, each in slower(architecture("gated_deltanet")).items()} == {
        **dict.fromkeys(("v_proj", "v_conv1d", "o_norm", "g_proj", "o_proj"), -3 * HALF),
        **dict.fromkeys(("q_proj", "q_conv1d", "k_proj", "k_conv1d"), -ONE),
        **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), -HALF),
    }


def test_a_gain_that_growing_heads_share_is_no_factor_of_one_channel() -> None:
    assert summed("gated_deltanet", scaling="head-dim-fixed")["H*d_v"] == {"v_proj", "v_conv1d", "g_proj", "o_proj"}


@pytest.mark.parametrize("scaling", ["heads-fixed", "head-dim-fixed", "mixed"])
def test_two_factors_never_get_away(scaling: str) -> None:
    assert not slower(architecture("mlp"))
    assert set(summed("transformer", scaling=scaling)) == {"ffn"}  # its gated MLP; q·k and v have two factors each


@pytest.mark.parametrize(("scaling", "gains"), [("heads-fixed", {"q_norm", "k_norm"}), ("head-dim-fixed", set())])
def test_gains_of_queries_and_keys_multiply_unless_growing_heads_share_them(scaling: str, gains: set[str]) -> None:
    found = {str(each.at): each for each in channels(architecture("transformer", scaling=scaling, qk_norm=True))}
    assert set(found["q_normed·k_normed"].roles) == {"q_proj", "k_proj"} | gains
    assert str(found["q_normed·k_normed"].axes) == "H*d_head"
    assert set(found["y"].roles) == {"v_proj", "o_proj"}  # a score is one number for all channels of its head


def test_the_state_of_a_scan_written_out_has_the_channels_of_its_keys() -> None:
    g = Builder("written out")
    heads, d_k, d_v = g.dim("H"), g.dim("d_k", 1), g.dim("d_v", 1)
    x = g.linear(g.input("x", g.dim("features")), "first", g.dim("n", 1))
    q, k, v = (
        g.reshape(g.linear(x, name, heads * size), heads, size) for name, size in (("q", d_k), ("k", d_k), ("v", d_v))
    )
    o = g.contract(g.contract(v, k, heads, d_v, d_k), q, heads, d_v, output="o")
    g.cross_entropy(g.readout(g.linear(g.reshape(o, heads * d_v), "last", g.dim("m", 1)), "head", g.dim("classes")))
    found = {each.at: each for each in channels(g.build())}
    assert (str(found["o"].axes), set(found["o"].roles)) == ("H*d_k", {"q", "k"})


@pytest.mark.parametrize("bias", [True, False])
def test_a_sum_has_what_its_parts_share(bias: bool) -> None:
    g = Builder("gated")
    width = g.dim("n", 1)
    x = g.pointwise("relu", g.linear(g.input("x", g.dim("features")), "first", width))
    one, two = (g.linear(x, name, width, bias=bias) for name in ("one", "two"))
    product = g.product(one, two)
    both = g.add(g.product(product, g.linear(x, "three", width)), g.product(product, g.pointwise("tanh", one)))
    g.cross_entropy(g.readout(g.linear(both, "last", width), "head", g.dim("classes")))
    assert [set(each.roles) for each in channels(g.build()) if each.roles[0] == "last"] == [{"one", "two", "last"}]


def test_summands_share_what_is_done_to_them_alike() -> None:
    """Mamba-2's o + D·v: both have silu(x_proj·x_conv1d)."""
    (each,) = (each for each in channels(architecture("mamba2")) if "out_proj" in each.roles)
    functions = [part.function for part in each.product.parts if isinstance(part, Applied)]
    assert functions == ["silu", "silu"]
    assert slower(architecture("mamba2"), integrate=True)[each.roles[0]].power < each.counted


def test_the_channels_that_ask_most_decide() -> None:
    g = Builder("twice")
    width, wider = g.dim("n", 1), g.dim("m", 1)
    x = g.linear(g.input("x", g.dim("features")), "first", width)
    two = g.product(g.linear(x, "one", wider), g.linear(x, "two", wider))
    three = g.product(two, g.linear(x, "three", wider))
    both = g.add(g.linear(two, "of_two", width), g.linear(three, "of_three", width), g.linear(two, "again", width))
    g.cross_entropy(g.readout(both, "head", g.dim("classes")))
    found = {role: each.power for role, each in slower(g.build()).items()}
    assert found == dict.fromkeys(("one", "two", "three", "of_three"), -ONE) | {"of_two": -HALF, "again": -HALF}


def test_channels_of_a_convolution_are_those_it_reads_at_every_place() -> None:
    g = Builder("convolution")
    n, places = g.dim("n", 1), g.dim("places")
    x = g.pointwise("relu", g.linear(g.input("x", g.dim("features")), "first", n))
    one, two = (
        g.op("broadcast", g.linear(x, name, n), shape=(as_group(n), as_group(places))) for name in ("one", "two")
    )
    weight = g.parameter("last", n, n, g.dim("taps"), law=NORMAL)
    y = g.op("convolution", g.product(one, two), weight)
    g.cross_entropy(g.readout(g.reshape(y, n * places), "out", g.dim("classes")))
    assert set(slower(g.build())) == {"last", "one", "two"}


def test_only_steps_that_follow_gradients_are_slowed_and_only_on_request() -> None:
    graph = architecture("gated_deltanet")
    assert found(derive(graph, "sgd")) == ["o", "y", "mlp_out"]
    assert not found(derive(graph, "adamw"))
    largest = derive(graph, "sgd", "largest-channel")
    assert not found(largest)
    assert {rule.role for rule in largest.rules if rule.lr_log is not None} == set(slower(graph))
    typical = derive(graph, "sgd")
    assert all(rule.lr_log is None for rule in typical.rules)
    assert [rule.lr for rule in largest.rules] == [rule.lr for rule in typical.rules]
    assert all(rule.lr_log is None for rule in derive(graph, "adamw", "largest-channel").rules)
    assert any("(ln N)^-3/2" in line for line in proof_lines(largest, "o_proj"))


def test_papers_show_the_logarithm() -> None:
    table = latex_table(derive(architecture("gated_deltanet"), "sgd", "largest-channel"))
    o_norm = next(line for line in table.splitlines() if r"\texttt{o\_norm}" in line)
    assert r"$n^{1}(\ln \texttt{H*d\_v})^{- 3 / 2}$ & $n^{-1}(\ln \texttt{H*d\_v})^{3 / 2}$" in o_norm


def test_learning_rates_fixed_by_hand_stay() -> None:
    table = derive(architecture("gated_deltanet"), "sgd", "largest-channel", fix={"v_proj.lr": "-1/4"})
    assert table.rule("v_proj").lr_log is None
    assert table.rule("v_conv1d").lr_log == -3 * HALF


def test_frozen_weights_are_no_factors() -> None:
    def gated(trainable: bool) -> set[str]:
        g = Builder("frozen")
        x = g.linear(g.input("x", g.dim("features")), "first", n := g.dim("n", 1))
        gain = g.parameter("gain", n, trainable=trainable)
        y = g.product(g.product(g.linear(x, "one", n), g.linear(x, "two", n)), gain)
        g.cross_entropy(g.readout(g.linear(y, "last", n), "head", g.dim("classes")))
        return next(set(each.roles) for each in channels(g.build()) if each.roles[0] == "last")

    assert gated(True) - gated(False) == {"gain"}


def test_files_keep_it_and_the_widths_alone_do_not_tell_the_factor() -> None:
    table = derive(architecture("gated_deltanet"), "sgd", "largest-channel")
    read = read_toml(write_toml(table))
    assert read == table
    assert "(ln N / ln N_base)^lr_log" in write_toml(table)
    assert "ln N" not in write_toml(derive(architecture("mlp"), "sgd", "largest-channel")).split("architecture")[0]
    assert read.rule("o_proj").channels == "H*d_v"
    with pytest.raises(DeriveError, match=r"number of channels, H\*d_v"):
        table.rule("o_proj").factors(256, 128)


def test_what_a_model_is_scaled_by_is_known_apart_from_what_was_found() -> None:
    table = derive(architecture("gated_deltanet"), "sgd")
    silent = derive(architecture("gated_deltanet"), "sgd", "largest-channel")
    more = table.with_findings(table.findings[:1])
    assert more.hash != table.hash
    assert more.knobs_hash == table.knobs_hash != silent.knobs_hash
