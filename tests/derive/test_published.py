"""Published rules, reproduced by choosing assumptions only. Each table names its source and is typed in here."""

from itertools import pairwise

import pytest
from sympy import Max, Rational

from widthwise.derive import Builder, architecture, derive

# Liu & Gu 2026, arXiv:2606.04048: role → (init std, multiplier, AdamW lr, SGD lr)
LIU_GU = {
    "embeddings": ("0", "0", "0", "1"),
    **dict.fromkeys(
        ("q_proj", "k_proj", "v_proj", "g_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        ("-1/2", "0", "-1", "0"),
    ),
    **dict.fromkeys(("a_proj", "b_proj"), ("-1/2", "0", "-1", "-1/2")),
    **dict.fromkeys(("A_log", "dt_bias"), ("0", "0", "0", "1/2")),
    "o_scale": (None, "1/2", None, None),
    "lm_head": (None, "-1", None, None),  # the logits' multiplier; the weight is the tied embedding
}


@pytest.mark.parametrize(("optimizer", "column"), [("adamw", 2), ("sgd", 3)])
def test_liu_gu_2026(optimizer: str, column: int) -> None:
    table = derive(architecture("gated_deltanet", tied=True), optimizer, preset="liu-gu-2026")
    for role, published in LIU_GU.items():
        rule = table.rule(role).as_dict()
        assert (rule["init_std"], rule["multiplier"], rule["lr"]) == (published[0], published[1], published[column]), (
            role
        )


def test_liu_gu_finds_what_the_hand_derivation_skipped() -> None:
    found = {
        (finding.kind, finding.where)
        for finding in derive(architecture("gated_deltanet", tied=True), "sgd", preset="liu-gu-2026").findings
    }
    assert {("operator-norm", "a_proj"), ("operator-norm", "b_proj"), ("nonlinear-coherence", "o")} <= found


# Tensor Programs V, arXiv:2203.03466, Table 8: (init std, multiplier, SGD lr, Adam lr)
TABLE_8 = {"input": ("0", "0", "1", "0"), "hidden": ("-1/2", "0", "0", "-1"), "output": ("0", "-1", "1", "0")}
# and Table 3, where the output has no multiplier: the same rules in another gauge
TABLE_3 = {**TABLE_8, "output": ("-1", "0", "-1", "-1")}

TRANSFORMER_KIND = {
    **dict.fromkeys(("embeddings", "attn_norm", "mlp_norm", "norm"), "input"),
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), "hidden"),
    "lm_head": "output",
}
MLP_KIND = {"input": "input", "input_bias": "input", "hidden": "hidden", "hidden_bias": "input", "output": "output"}


@pytest.mark.parametrize(("optimizer", "column"), [("sgd", 2), ("adam", 3)])
@pytest.mark.parametrize(("gauge", "published"), [("multiplier", TABLE_8), ("absorbed", TABLE_3)])
def test_tensor_programs_v_mlp(optimizer: str, column: int, gauge: str, published: dict) -> None:
    table = derive(architecture("mlp"), optimizer, preset="tensor-programs-v", gauge=gauge)
    for role, kind in MLP_KIND.items():
        rule = table.rule(role).as_dict()
        assert (rule["init_std"], rule["multiplier"], rule["lr"]) == (*published[kind][:2], published[kind][column]), (
            role
        )


@pytest.mark.parametrize(("optimizer", "column"), [("sgd", 2), ("adam", 3)])
@pytest.mark.parametrize("gqa", [False, True])
def test_tensor_programs_v_transformer(optimizer: str, column: int, gqa: bool) -> None:
    table = derive(architecture("transformer", gqa=gqa), optimizer, preset="tensor-programs-v")
    assert {rule.role for rule in table.rules} == {*TRANSFORMER_KIND, "attn_scale"}
    for role, kind in TRANSFORMER_KIND.items():
        rule = table.rule(role).as_dict()
        assert (rule["init_std"], rule["multiplier"], rule["lr"]) == (*TABLE_8[kind][:2], TABLE_8[kind][column]), role
    assert table.rule("attn_scale").as_dict()["multiplier"] == "-1"  # 1/d_head, d_head ∝ n


def test_attention_scale_follows_the_head_dim() -> None:
    scale = {
        scaling: derive(architecture("transformer", scaling=scaling), "adamw")
        .rule("attn_scale")
        .as_dict()["multiplier"]
        for scaling in ("heads-fixed", "head-dim-fixed", "mixed")
    }
    assert scale == {"heads-fixed": "-1", "head-dim-fixed": "0", "mixed": "-h"}


# Everett et al. 2024, arXiv:2407.05872: c of [embedding, hidden, readout], lr ∝ n^-c
EVERETT = {
    ("standard", "adam", "full"): ("0", "1", "1"),
    ("standard", "adam", "no"): ("0", "1/2", "1/2"),
    ("standard", "sgd", "full"): ("-1/2", "1/2", "1"),
    ("ntk", "adam", "full"): ("0", "1/2", "1/2"),
    ("ntk", "adam", "no"): ("0", "0", "0"),
    ("ntk", "sgd", "full"): ("-1/2", "-1/2", "0"),
    ("mup", "adam", "full"): ("1/2", "1", "1/2"),
    ("mup", "adam", "no"): ("1/2", "1/2", "0"),
    ("mup", "sgd", "full"): ("0", "0", "0"),
    ("mean-field", "adam", "full"): ("0", "1/2", "0"),
    ("mean-field", "adam", "no"): ("0", "0", "-1/2"),
    ("mean-field", "sgd", "full"): ("-1", "-1", "-1"),
}


@pytest.mark.parametrize(("parametrization", "optimizer", "alignment"), EVERETT)
def test_everett_2024(parametrization: str, optimizer: str, alignment: str) -> None:
    table = derive(
        architecture("mlp", bias=False),
        optimizer,
        preset=f"everett-{alignment}-alignment",
        parametrization=parametrization,
    )
    derived = tuple(str(-table.rule(role).lr) for role in ("input", "hidden", "output"))
    assert derived == EVERETT[parametrization, optimizer, alignment]


# In a pre-norm Transformer the readings are the same, role by role; q and k are left out under SGD, where the paper's
# MLP has nothing like the product of two activations that makes their gradients.
TRANSFORMER_HIDDEN = ("v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize(("parametrization", "optimizer", "alignment"), EVERETT)
def test_everett_2024_transformer(parametrization: str, optimizer: str, alignment: str) -> None:
    table = derive(
        architecture("transformer"),
        optimizer,
        preset=f"everett-{alignment}-alignment",
        parametrization=parametrization,
    )
    hidden = TRANSFORMER_HIDDEN + (("q_proj", "k_proj") if optimizer == "adam" else ())
    expected = EVERETT[parametrization, optimizer, alignment]
    assert str(-table.rule("embeddings").lr) == expected[0]
    assert {str(-table.rule(role).lr) for role in hidden} == {expected[1]}
    assert str(-table.rule("lm_head").lr) == expected[2]


@pytest.mark.parametrize("exponents", [("1/3", "1", "2/3"), ("1", "1/2", "1/4"), ("1", "1")])
def test_spectral_condition(exponents: tuple[str, ...]) -> None:
    """arXiv:2310.17813: ‖W‖ ∝ √(out/in); lr ∝ out/in for SGD, 1/in for signs, √(out/in) for orthogonal steps."""
    widths = [Rational(0), *map(Rational, exponents)]
    graph = architecture("mlp", activation="none", bias=False, dims=exponents)
    tables = {optimizer: derive(graph, optimizer, "aligned") for optimizer in ("sgd", "adam", "muon")}
    for layer, (fan_in, fan_out) in enumerate(pairwise(widths), 1):
        role = f"layer{layer}"
        norm = tables["sgd"].rule(role).init_std + Max(fan_in, fan_out) / 2
        assert norm == (fan_out - fan_in) / 2
        assert tables["sgd"].rule(role).lr == fan_out - fan_in
        assert tables["adam"].rule(role).lr == -fan_in
        assert tables["muon"].rule(role).lr == (fan_out - fan_in) / 2


def test_spectral_condition_of_the_transformer() -> None:
    graph = architecture("transformer")
    for optimizer, step in (("sgd", 0), ("adam", -1), ("muon", 0)):
        table = derive(graph, optimizer, "aligned")
        for role in ("q_proj", "k_proj", *TRANSFORMER_HIDDEN):
            assert table.rule(role).init_std + Rational(1, 2) == 0, role  # ‖W‖ = Θ(1), fan-in and fan-out alike
            assert table.rule(role).lr == step, (optimizer, role)


@pytest.mark.parametrize(("optimizer", "column"), [("sgd", 2), ("adam", 3)])
def test_tensor_programs_v_table_3_transformer(optimizer: str, column: int) -> None:
    """Without multipliers: the readout's moves into its init, the attention scale's into the query projection."""
    table = derive(architecture("transformer"), optimizer, preset="tensor-programs-v", gauge="absorbed")
    assert {str(rule.multiplier) for rule in table.rules} == {"0"}
    for role, kind in TRANSFORMER_KIND.items():
        rule = table.rule(role).as_dict()
        published = TABLE_3[kind]
        if role != "q_proj":
            assert (rule["init_std"], rule["lr"]) == (published[0], published[column]), role


def test_no_exponent_is_typed_into_the_engine_for_a_role() -> None:
    """The same parts under other names and other exponents give other rules: nothing looks at names."""
    g = Builder("renamed")
    width = g.dim("anything", "1/2")
    h = g.pointwise("relu", g.linear(g.input("x", g.dim("features")), "a_proj", width))
    g.cross_entropy(g.readout(h, "embeddings", g.dim("classes")))
    rule = derive(g.build(), "adam").rule("embeddings").as_dict()
    assert (rule["multiplier"], rule["lr"]) == ("-1/2", "0")
