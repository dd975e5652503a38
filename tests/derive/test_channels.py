"""Channels in which trained factors multiply: how many there are, and what the largest channel does to them."""

import pytest

from widthwise.derive import Builder, DeriveError, RuleTable, architecture, derive, read_toml, write_toml
from widthwise.derive.channels import channels, slower
from widthwise.derive.exponents import HALF, ONE
from widthwise.derive.proof import proof_lines


def summed(name: str, **options: object) -> dict[str, set[str]]:
    """The factors behind each sum in which more than two multiply, by the axes of the channels."""
    return {str(each.axes): set(each.roles) for each in channels(architecture(name, **options)) if each.slower != 0}


def found(table: RuleTable) -> list[str]:
    return [each.where for each in table.findings if each.kind == "largest-channel"]


def test_factors_of_the_mixer_are_counted_back_to_the_linear_maps() -> None:
    assert summed("gated_deltanet") == {
        "H*d_k": {"q_proj", "q_conv1d", "k_proj", "k_conv1d"},
        "H*d_v": {"v_proj", "v_conv1d", "o_norm", "g_proj", "o_proj"},
        "ffn": {"gate_proj", "up_proj", "down_proj"},
    }
    assert {role: each.slower for role, each in slower(architecture("gated_deltanet")).items()} == {
        **dict.fromkeys(("v_proj", "v_conv1d", "o_norm", "g_proj", "o_proj"), -3 * HALF),
        **dict.fromkeys(("q_proj", "q_conv1d", "k_proj", "k_conv1d"), -ONE),
        **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), -HALF),
    }


def test_a_gain_that_growing_heads_share_is_no_factor_of_one_channel() -> None:
    assert summed("gated_deltanet", scaling="head-dim-fixed")["H*d_v"] == {"v_proj", "v_conv1d", "g_proj", "o_proj"}


def test_two_factors_never_get_away() -> None:
    assert not slower(architecture("mlp"))
    assert set(summed("transformer")) == {"ffn"}  # its gated MLP; q·k and v have two factors each


@pytest.mark.parametrize("bias", [True, False])
def test_a_sum_has_what_its_parts_share(bias: bool) -> None:
    g = Builder("gated")
    width = g.dim("n", 1)
    x = g.pointwise("relu", g.linear(g.input("x", g.dim("features")), "first", width))
    one, two = (g.linear(x, name, width, bias=bias) for name in ("one", "two"))
    product = g.product(one, two)
    both = g.add(product, g.product(product, g.pointwise("tanh", one)))
    g.cross_entropy(g.readout(g.linear(both, "last", width), "head", g.dim("classes")))
    assert [set(each.roles) for each in channels(g.build()) if each.roles[0] == "last"] == [{"one", "two", "last"}]


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


def test_files_keep_it_and_the_widths_alone_do_not_tell_the_factor() -> None:
    table = derive(architecture("gated_deltanet"), "sgd", "largest-channel")
    read = read_toml(write_toml(table))
    assert read == table
    assert read.rule("o_proj").channels == "H*d_v"
    with pytest.raises(DeriveError, match=r"number of channels, H\*d_v"):
        table.rule("o_proj").factors(256, 128)


def test_what_a_model_is_scaled_by_is_known_apart_from_what_was_found() -> None:
    table = derive(architecture("gated_deltanet"), "sgd")
    silent = derive(architecture("gated_deltanet"), "sgd", "largest-channel")
    more = table.with_findings(table.findings[:1])
    assert more.hash != table.hash
    assert more.knobs_hash == table.knobs_hash != silent.knobs_hash
