"""Rules of traced models are those of the descriptions."""

import pytest
import traced_descriptions
import traced_models

from widthwise.derive import architecture, derive
from widthwise.derive.channels import slower
from widthwise.derive.exponents import HALF
from widthwise.derive.graph_toml import read_graph, write_graph
from widthwise.verify.trace import trace

KNOBS = ("init_std", "multiplier", "lr", "weight_decay", "eps")
OPTIMIZERS = ("adamw", "sgd", "muon")


def same(traced, described, roles: dict[str, str], optimizers=OPTIMIZERS) -> None:
    """Every traced rule is that of the role it stands for, and all described roles are there."""
    for optimizer in optimizers:
        mine, theirs = derive(traced, optimizer), derive(described, optimizer)
        assert {rule.role for rule in mine.rules} == set(roles)
        assert {rule.role for rule in theirs.rules} == set(roles.values())
        for role, other in roles.items():
            a, b = (
                [getattr(table.rule(name), knob) for knob in KNOBS] for table, name in ((mine, role), (theirs, other))
            )
            assert a == b, (optimizer, role, other)
    mine, theirs = slower(traced), slower(described)
    assert {role: each.power for role, each in mine.items()} == {
        role: theirs[other].power for role, other in roles.items() if other in theirs
    }


def test_mlp(traced) -> None:
    roles = {each: each for each in ("input", "input_bias", "hidden", "hidden_bias", "output")}
    same(traced("mlp").graph, architecture("mlp"), roles)
    patterns = {rule.role: rule.parameters for rule in derive(traced("mlp").graph).rules}
    assert patterns["hidden"] == ("layers.*.hidden.weight",)


def test_cnn(traced) -> None:
    roles = {"layer_0": "first", "layer_0_bias": "first_bias", "layer_2": "second", "layer_2_bias": "second_bias"}
    roles |= {"layer_6": "third", "layer_6_bias": "third_bias", "layer_8": "readout"}
    same(traced("cnn").graph, traced_descriptions.cnn(), roles)


def test_resnet(traced) -> None:
    """Each block of one Sequential by its own names: they share no pattern."""
    graph = traced("resnet").graph
    for optimizer in OPTIMIZERS:
        mine, theirs = derive(graph, optimizer), derive(traced_descriptions.resnet(), optimizer)
        names = {"branch_0": "norm_1", "branch_0_bias": "norm_1_bias", "branch_2": "conv_1"}
        names |= {"branch_3": "norm_2", "branch_3_bias": "norm_2_bias", "branch_5": "conv_2"}
        roles = {f"{name}{block}": other for name, other in names.items() for block in ("", "_2", "_3")}
        roles |= {"layer_0": "stem", "layer_4": "norm", "layer_4_bias": "norm_bias", "layer_8": "readout"}
        assert {rule.role for rule in mine.rules} == set(roles)
        for role, other in roles.items():
            a, b = mine.rule(role), theirs.rule(other)
            assert [getattr(a, knob) for knob in KNOBS] == [getattr(b, knob) for knob in KNOBS], (optimizer, role)


LLAMA = {
    "embed_tokens": "embeddings",
    "input_layernorm": "attn_norm",
    "q_proj": "q_proj",
    "k_proj": "k_proj",
    "v_proj": "v_proj",
    "attn_factor": "attn_scale",
    "o_proj": "o_proj",
    "post_attention_layernorm": "mlp_norm",
    "gate_proj": "gate_proj",
    "up_proj": "up_proj",
    "down_proj": "down_proj",
    "norm": "norm",
    "lm_head": "lm_head",
}


def test_llama(traced) -> None:
    same(traced("llama").graph, architecture("transformer", scaling="head-dim-fixed", gqa=True), LLAMA)


def test_qwen3(traced) -> None:
    described = architecture("transformer", scaling="head-dim-fixed", gqa=True, qk_norm=True)
    same(traced("qwen3").graph, described, LLAMA | {"q_norm": "q_norm", "k_norm": "k_norm"})


def test_llama_with_a_fixed_number_of_heads(traced) -> None:
    """The model's own d_head^(-1/2) is there already, so that the multiplier beside it is n^-1/2 and not n^-1."""
    del traced
    pytest.importorskip("transformers")
    graph = trace(lambda n: traced_models.llama(n, heads=4), traced_models.WIDTHS).graph
    for optimizer in OPTIMIZERS:
        mine, theirs = derive(graph, optimizer), derive(architecture("transformer"), optimizer)
        for role, other in LLAMA.items():
            if role != "attn_factor":
                a, b = mine.rule(role), theirs.rule(other)
                assert [getattr(a, knob) for knob in KNOBS] == [getattr(b, knob) for knob in KNOBS], (optimizer, role)
        assert theirs.rule("attn_scale").multiplier == -1
        assert mine.rule("attn_factor").multiplier == -HALF


def test_tied_llama(traced) -> None:
    del traced
    pytest.importorskip("transformers")
    graph = trace(lambda n: traced_models.llama(n, tie_word_embeddings=True), traced_models.WIDTHS).graph
    described = architecture("transformer", scaling="head-dim-fixed", gqa=True, tied=True)
    same(graph, described, LLAMA)
    assert graph.parameters["embed_tokens"].patterns == ("model.embed_tokens.weight", "lm_head.weight")


def test_gpt2(traced) -> None:
    """Weights stored as [in, out], q, k, v side by side in one."""
    graph = traced("gpt2").graph
    described = architecture("transformer", scaling="head-dim-fixed", tied=True)
    roles = {f"c_attn_{at}": f"{name}_proj" for at, name in enumerate("qkv")} | {"wte": "embeddings", "ln_f": "norm"}
    roles |= {"attn_c_proj": "o_proj", "c_fc": "up_proj", "mlp_c_proj": "down_proj", "ln_1": "attn_norm"}
    for optimizer in OPTIMIZERS:
        mine, theirs = derive(graph, optimizer), derive(described, optimizer)
        for role, other in roles.items():
            a, b = mine.rule(role), theirs.rule(other)
            assert [getattr(a, knob) for knob in KNOBS] == [getattr(b, knob) for knob in KNOBS], (optimizer, role)
    assert graph.parameters["c_attn_1"].rows.axis == 1
    assert graph.parameters["c_attn_1"].input_first
    assert not graph.parameters["wte"].input_first


def test_mamba2(traced) -> None:
    roles = {
        "embeddings": "embeddings",
        "layers_norm": "attn_norm",
        "in_proj_0": "z_proj",
        "in_proj_1": "x_proj",
        "in_proj_2": "B_proj",
        "in_proj_3": "C_proj",
        "in_proj_4": "dt_proj",
        "conv1d_0": "x_conv1d",
        "conv1d_1": "B_conv1d",
        "conv1d_2": "C_conv1d",
        "dt_bias": "dt_bias",
        "A_log": "A_log",
        "D": "D",
        "mixer_norm": "gated_norm",
        "out_proj": "out_proj",
        "norm_f": "norm",
        "lm_head": "lm_head",
    }
    graph = traced("mamba2").graph
    biases = {"conv1d_bias_0": "x_bias", "conv1d_bias_1": "B_bias", "conv1d_bias_2": "C_bias"}
    for optimizer in OPTIMIZERS:
        mine, theirs = derive(graph, optimizer), derive(architecture("mamba2"), optimizer)
        assert {rule.role for rule in mine.rules} == roles.keys() | biases.keys()
        assert {rule.role for rule in theirs.rules} == set(roles.values())
        for role, other in roles.items():
            a, b = mine.rule(role), theirs.rule(other)
            assert [getattr(a, knob) for knob in KNOBS] == [getattr(b, knob) for knob in KNOBS], (optimizer, role)
    assert graph.parameters["in_proj_3"].rows.sizes == (256, 256, 16, 16, 8)
    assert graph.parameters["in_proj_3"].rows.exponents == (1, 1, 0, 0, 1)


def test_qwen3_next(traced) -> None:
    """Hybrid, routed, packed: 48 parameters of one layer group become one role each, rows by rows."""
    roles = {"embed_tokens": "embed", "model_norm": "norm", "lm_head": "lm_head"}
    roles |= {"o_scale": "o_scale", "attn_factor": "attn_scale", "A_log": "A_log", "dt_bias": "dt_bias"}
    roles |= {f"in_proj_qkvz_{at}": f"{name}_proj" for at, name in enumerate("qkvz")}
    roles |= {f"in_proj_ba_{at}": f"{name}_proj" for at, name in enumerate("ba")}
    roles |= {f"conv1d_{at}": f"{name}_conv1d" for at, name in enumerate("qkv")}
    roles |= {"linear_attn_norm": "o_norm", "out_proj": "out_proj", "q_norm": "q_norm", "k_norm": "k_norm"}
    roles |= {"q_proj_0": "attn_q", "q_proj_1": "attn_gate", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_o"}
    for suffix, kind in (("", "delta"), ("_2", "attn")):
        roles |= {
            f"input_layernorm{suffix}": f"{kind}_norm",
            f"post_attention_layernorm{suffix}": f"{kind}_mlp_norm",
            f"gate{suffix}": f"{kind}_router",
            f"gate_up_proj{suffix}_0": f"{kind}_expert_gate",
            f"gate_up_proj{suffix}_1": f"{kind}_expert_up",
            f"experts_down_proj{suffix}": f"{kind}_expert_down",
            f"gate_proj{suffix}": f"{kind}_shared_gate",
            f"up_proj{suffix}": f"{kind}_shared_up",
            f"shared_expert_down_proj{suffix}": f"{kind}_shared_down",
            f"shared_expert_gate{suffix}": f"{kind}_shared_by",
        }
    same(traced("qwen3_next").graph, traced_descriptions.qwen3_next(), roles)


def test_grouped_matmuls_of_experts(traced) -> None:
    """However transformers computes its experts, they are leaves: weights, shapes and rules are the same."""
    eager = derive(traced("qwen3_next").graph)
    graph = trace(lambda n: traced_models.qwen3_next(n, 4, "grouped_mm"), traced_models.WIDTHS).graph
    assert {rule.role: rule.lr for rule in derive(graph).rules} == {rule.role: rule.lr for rule in eager.rules}


@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet", "llama", "qwen3", "gpt2", "mamba2", "qwen3_next"])
def test_the_file_holds_everything(traced, name: str) -> None:
    graph = traced(name).graph
    text = write_graph(graph)
    again = read_graph(text)
    assert write_graph(again) == text
    assert derive(again).hash == derive(graph).hash
