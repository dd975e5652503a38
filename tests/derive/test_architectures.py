"""The catalogue: every option of every architecture derives, and does what it says."""

import pytest

from widthwise.derive import ARCHITECTURES, architecture, derive
from widthwise.derive.architectures import options
from widthwise.derive.architectures.common import SCALINGS

SWITCHES = [
    (name, option, not default)
    for name in ARCHITECTURES
    for option, default in options(name).items()
    if isinstance(default, bool)
]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(("name", "option", "value"), SWITCHES, ids=[f"{each[0]}-{each[1]}" for each in SWITCHES])
def test_every_switch_derives(name: str, option: str, value: bool, optimizer: str) -> None:
    table = derive(architecture(name, **{option: value}), optimizer)
    assert all(rule.lr is not None for rule in table.rules if rule.parameters)
    assert not [each for each in table.findings if each.kind == "growth"]


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if "scaling" in options(name)])
def test_every_scaling_derives(name: str, scaling: str) -> None:
    assert derive(architecture(name, scaling=scaling), "sgd").scaling == scaling


def roles(**chosen: object) -> set[str]:
    return {rule.role for rule in derive(architecture("gated_deltanet", **chosen)).rules}


def test_parts_left_out_leave_no_rules() -> None:
    everything = roles()
    assert everything - roles(conv=False) == {"q_conv1d", "k_conv1d", "v_conv1d"}
    assert everything - roles(gate=False) == {"g_proj"}
    assert everything - roles(decay=False) == {"a_proj", "A_log", "dt_bias"}
    assert everything - roles(o_scale=False) == {"o_scale"}
    assert everything - roles(mlp=False) == {"mlp_norm", "gate_proj", "up_proj", "down_proj"}
    assert everything == roles(tied=True)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("option", ["value_groups", "expand_v"])
def test_width_free_factors_move_no_exponent(option: str, optimizer: str) -> None:
    one, other = (derive(architecture("gated_deltanet", **{option: value}), optimizer) for value in (False, True))
    for rule in one.rules:
        twin = other.rule(rule.role)
        assert (rule.init_std, rule.lr, rule.multiplier) == (twin.init_std, twin.lr, twin.multiplier), rule.role


def test_projections_that_feed_a_norm_directly() -> None:
    """Without activation and convolution q meets its norm at once: still Θ(1), so that eps stays far below."""
    table = derive(architecture("gated_deltanet", activation=False, conv=False), "adamw")
    assert table.rule("q_proj").as_dict()["init_std"] == "-1/2"
    assert table.rule("q_proj").as_dict()["lr"] == "-1"


def test_tied_table_is_one_parameter_with_two_uses() -> None:
    for optimizer, lr in (("adamw", "0"), ("sgd", "1")):
        table = derive(architecture("gated_deltanet", tied=True), optimizer)
        assert table.rule("embeddings").as_dict()["lr"] == lr
        assert table.rule("lm_head").parameters == ()
        assert table.rule("lm_head").as_dict()["multiplier"] == "-1"


def test_patterns_are_flas_names() -> None:
    patterns = {pattern for rule in derive(architecture("gated_deltanet")).rules for pattern in rule.parameters}
    assert {
        "model.embeddings.weight",
        "model.layers.*.attn.A_log",
        "model.layers.*.attn.q_conv1d.weight",
        "model.layers.*.mlp.down_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
    } <= patterns
