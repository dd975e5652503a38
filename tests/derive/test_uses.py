"""Weights with several uses, shared gains, frozen parts, coupled decay: where one rule must serve several masters."""

import pytest
from sympy import Rational

from widthwise.derive import Builder, DeriveError, Graph, RuleTable, architecture, derive
from widthwise.derive.assume import SETS
from widthwise.derive.backward import Backward
from widthwise.derive.exponents import show
from widthwise.derive.forward import walk_forward


def twice(order: str) -> Graph:
    """One table read as an embedding and used as a square-less linear map onto it, in either order."""
    g = Builder("twice")
    n, vocab = g.dim("n", 1), g.dim("vocab")
    x = g.embedding("table", vocab, n, output="x")
    h = g.norm(x, output="h")
    scores = g.linear(h, "scores", vocab, tied_to="table", output="scores")
    y = g.residual(x, g.linear(g.pointwise("tanh", scores), "back", n))
    g.cross_entropy(g.readout(g.norm(y), "head", vocab))
    return g.build()


def test_a_knob_obeys_the_tightest_of_all_uses() -> None:
    """As a table it may be Θ(1); as a readout of n inputs it may be n^-1 only, and that binds."""
    table = derive(twice("table first"), "adamw")
    assert table.rule("table").as_dict()["init_std"] == "-1"
    assert table.rule("table").as_dict()["lr"] == "-1"
    assert [each for each in table.findings if each.kind in ("growth", "operator-norm")] == []


def test_a_learning_rate_obeys_the_tightest_of_all_uses() -> None:
    """Under Adam the look-up tolerates lr n^0, the inner product n^-1."""
    rule = derive(twice("table first"), "adam", fix={"table.init_std": "-1"}).rule("table")
    assert rule.as_dict()["lr"] == "-1"
    assert "tanh" in rule.binding or "scores" in rule.binding


def test_a_weight_shared_by_heads_sums_its_gradient_over_them() -> None:
    g = Builder("shared")
    n, heads, d = g.dim("n", 1), g.dim("H", "1/2"), g.dim("d", "1/2")
    x = g.reshape(g.linear(g.input("f", g.dim("F")), "first", heads * d), heads, d)
    y = g.reshape(g.linear(g.norm(x), "per_head", g.dim("e", "1/2")), heads * g.dim("e", "1/2"))
    g.cross_entropy(g.readout(g.norm(g.linear(y, "out", n)), "head", g.dim("V")))
    early, aligned = (derive(g.build(), "sgd", request) for request in ("at-init", "aligned"))
    assert show(early.rule("per_head").lr - aligned.rule("per_head").lr) == "1/4"  # √H more signs cancel early


def test_adam_couples_weight_decay_to_the_gradient() -> None:
    for role in ("input", "hidden", "output"):
        adam, adamw = (derive(architecture("mlp"), name).rule(role) for name in ("adam", "adamw"))
        assert adam.weight_decay == adamw.eps - adamw.init_std  # wd·w keeps pace with the gradient, which eps follows
        assert adamw.weight_decay == -adamw.lr
        assert adam.eps == adamw.eps


def test_muon_keeps_adams_eps_for_what_it_gives_to_adam() -> None:
    table, adamw = (derive(architecture("gated_deltanet"), name) for name in ("muon", "adamw"))
    for role in ("embeddings", "attn_norm", "q_conv1d", "A_log", "lm_head"):
        assert table.rule(role).eps == adamw.rule(role).eps
    assert table.rule("q_proj").eps is None


def test_layer_norm_takes_the_mean_away() -> None:
    """q·k of rectified features is coherent after RMSNorm (measured slope 0.99) and not after LayerNorm (0.52)."""
    sizes = {}
    for kind in ("rms_norm", "layer_norm"):
        g = Builder(kind)
        n, d = g.dim("n", 1), g.dim("d", 1)
        x = g.norm(g.linear(g.input("f", g.dim("F")), "first", n))
        q, k = (g.norm(g.pointwise("relu", g.linear(x, each, d)), kind=kind) for each in ("wq", "wk"))
        score = g.scale(g.contract(q, k, output="qk"), multiplier="scale")
        y = g.product(x, g.pointwise("sigmoid", score), n)
        g.cross_entropy(g.readout(g.norm(y), "head", g.dim("V")))
        sizes[kind] = show(derive(g.build()).tensor("qk").forward)
    assert sizes == {"rms_norm": "1", "layer_norm": "1/2"}


def test_relu_keeps_its_mean_at_any_size() -> None:
    """ReLU is homogeneous: its mean fraction is 0.56 of the rms whether or not its input is Θ(1)."""
    g = Builder("small")
    n, d = g.dim("n", 1), g.dim("d", 1)
    x = g.scale(g.norm(g.linear(g.input("f", g.dim("F")), "first", n)), "-1/2")
    q, k = (g.norm(g.pointwise("relu", g.scale(g.linear(x, each, d), "-1/4")), kind="l2_norm") for each in ("wq", "wk"))
    y = g.product(x, g.pointwise("sigmoid", g.contract(q, k, output="qk")), n)
    g.cross_entropy(g.readout(g.norm(y), "head", g.dim("V")))
    assert show(derive(g.build()).tensor("qk").forward) == "0"


def frozen() -> Graph:
    g = Builder("frozen")
    n = g.dim("n", 1)
    x = g.norm(g.embedding("table", g.dim("V"), n, trainable=False, output="x"))
    x = g.norm(g.linear(x, "w", n, trainable=False))
    g.cross_entropy(g.readout(x, "head", g.dim("V")))
    return g.build()


@pytest.mark.parametrize("gauge", ["multiplier", "absorbed"])
def test_frozen_parameters_have_an_init_and_no_step(gauge: str) -> None:
    table = derive(frozen(), "adamw", gauge=gauge, parametrization="mup")
    for role in ("table", "w"):
        rule = table.rule(role)
        assert (rule.lr, rule.weight_decay, rule.eps) == (None, None, None)
        assert rule.init_std == Rational(-1, 2)


def test_a_frozen_weight_absorbs_nothing() -> None:
    g = Builder("frozen query")
    n, d = g.dim("n", 1), g.dim("d", 1)
    x = g.norm(g.linear(g.input("f", g.dim("F")), "first", n))
    q = g.linear(x, "q", d, trainable=False)
    o = g.attention(q, g.linear(x, "k", d), g.linear(x, "v", d))
    g.cross_entropy(g.readout(g.norm(g.linear(o, "out", n)), "head", g.dim("V")))
    table = derive(g.build(), gauge="absorbed")
    assert table.rule("attn_scale").as_dict()["multiplier"] == "-1"
    assert "kept" in table.rule("attn_scale").binding


def absorbed_sizes_match(graph: Graph, optimizer: str, **request: str) -> None:
    """Pin every init and multiplier of the absorbed table: no bound breaks, and the logits keep their size."""
    absorbed = derive(graph, optimizer, gauge="absorbed", **request)
    plain = derive(graph, optimizer, **request)
    pins = {
        f"{rule.role}.{knob}": value
        for rule in absorbed.rules
        for knob in ("init_std", "multiplier")
        if (value := getattr(rule, knob)) is not None and pinnable(graph, rule.role, knob)
    }
    again = derive(graph, optimizer, fix=pins)
    assert show(again.tensor("logits").forward) == show(plain.tensor("logits").forward)
    assert [each.message for each in again.findings if each.kind == "growth" and "logits" in each.where] == []


def pinnable(graph: Graph, role: str, knob: str) -> bool:
    weights = {node.inputs[-1] for node in graph.nodes if node.op in ("linear", "conv1d", "embedding")}
    carriers = {node.attrs["carrier"] for node in graph.nodes if node.attrs.get("carrier")}
    return (knob == "init_std" and role in graph.parameters) or role in (weights | carriers) - {"attn_scale"}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("parametrization", [None, "mup", "ntk", "mean-field"])
def test_absorbing_leaves_the_function_alone(tied: bool, parametrization: str | None) -> None:
    graph = architecture("transformer", tied=tied, scaling="head-dim-fixed")
    absorbed_sizes_match(graph, "adamw", **({"parametrization": parametrization} if parametrization else {}))


def test_a_gradient_that_drifts_with_depth_is_found() -> None:
    found = {
        each.kind: each for each in derive(architecture("gated_linear_attention"), "sgd", regime="asymptotic").findings
    }
    assert show(found["gradient-depth"].exponent) == "1/2"


def test_state_of_the_scan_is_listed() -> None:
    sizes: dict[str, RuleTable] = {
        scaling: derive(architecture("gated_deltanet", scaling=scaling), "sgd")
        for scaling in ("heads-fixed", "head-dim-fixed")
    }
    assert {name: table.tensor("S").as_dict()["forward"] for name, table in sizes.items()} == {
        "heads-fixed": "-1/2",
        "head-dim-fixed": "0",
    }
    assert {name: table.tensor("S").as_dict()["gradient"] for name, table in sizes.items()} == {
        "heads-fixed": "-1",
        "head-dim-fixed": "-1",
    }


def test_odd_functions_keep_signs_and_others_leave_a_mean() -> None:
    """tanh leaves q·k incoherent; relu's mean (0.32 in the product) takes over at 10 entries, so at once."""
    sizes = {}
    for function in ("tanh", "relu"):
        g = Builder(function)
        n, d = g.dim("n", 1), g.dim("d", 1)
        x = g.norm(g.linear(g.input("f", g.dim("F")), "first", n))
        q, k = (g.norm(g.pointwise(function, g.linear(x, each, d)), kind="l2_norm") for each in ("wq", "wk"))
        y = g.product(x, g.pointwise("sigmoid", g.contract(q, k, output="qk")), n)
        g.cross_entropy(g.readout(g.norm(y), "head", g.dim("V")))
        sizes[function] = show(derive(g.build()).tensor("qk").forward)
    assert sizes == {"tanh": "-1/2", "relu": "0"}


def test_a_multiplier_read_by_more_than_a_norm_is_not_absorbed_into_its_eps() -> None:
    def table(twice_read: bool) -> RuleTable:
        g = Builder("read")
        n = g.dim("n", 1)
        x = g.scale(g.linear(g.input("f", g.dim("F")), "first", n), "-1/2")
        h = g.scale(g.pointwise("relu", x), multiplier="boost", output="boosted")
        y = g.norm(h)
        y = g.add(y, g.pointwise("tanh", h)) if twice_read else y
        g.cross_entropy(g.readout(g.norm(y), "head", g.dim("V")))
        return derive(g.build(), gauge="absorbed", fix={"first.init_std": 0})

    assert table(False).rule("boost").norm_eps is not None
    assert table(True).rule("boost").norm_eps is None


def test_erasing_along_long_keys_is_refused() -> None:
    def model(normalized: bool, erase: bool) -> Graph:
        g = Builder("keys")
        n, d = g.dim("n", 1), g.dim("d", 1)
        x = g.norm(g.linear(g.input("f", g.dim("F")), "first", n))
        q, k, v = (g.linear(x, each, d) for each in ("q", "k", "v"))
        if normalized:
            k = g.norm(k, kind="l2_norm")
        one = g.dim("one")
        beta = g.contract(g.pointwise("sigmoid", g.linear(x, "b", one)), g.input("unit", one))
        o = g.norm(g.scan(q, k, v, strength=beta, erase=erase))
        g.cross_entropy(g.readout(g.norm(g.linear(o, "out", n)), "head", g.dim("V")))
        return g.build()

    with pytest.raises(DeriveError, match="length n\\^1/2: its state diverges"):
        derive(model(normalized=False, erase=True))
    derive(model(normalized=True, erase=True))
    derive(model(normalized=False, erase=False))


def test_factors_need_numbers() -> None:
    with pytest.raises(DeriveError, match="derive one scaling"):
        derive(architecture("gated_deltanet", scaling="mixed")).rule("a_proj").factors(512, 256)
    assert derive(architecture("mlp"), "adam").rule("hidden").factors(512, 256)["lr"] == 0.5


def gated_twice(bias: bool) -> Graph:
    """Few outputs b, c, which open a gate together: both start at n^-1/2 and are brought to n^0."""
    g = Builder("gated_twice")
    n, few = g.dim("n", 1), g.dim("few")
    x = g.embedding("table", g.dim("vocab"), n)
    h = g.norm(x, output="h")
    b, c = (g.linear(h, name, few, bias=bias) for name in ("b", "c"))
    gate = g.product(b, c, output="gate")
    y = g.linear(g.product(g.linear(h, "v", n), gate, n), "o", n)
    g.cross_entropy(g.readout(g.norm(g.residual(x, y)), "head", g.dim("classes")))
    return g.build()


@pytest.mark.parametrize("bias", [False, True])
def test_a_bias_adds_nothing_before_training(bias: bool) -> None:
    walk = Backward(walk_forward(gated_twice(bias), SETS["at-init"], {})).run()
    assert show(walk.states["gate"].init.size) == "-1"
    assert show(walk.states["gate"].trained) == "0"
    assert show(walk.gradients["b"].size) == "-1/2"  # with c as large as training makes it
    if bias:
        rule = derive(gated_twice(bias), "adamw").rule("b_bias")
        assert (show(rule.init_std), show(rule.lr), show(rule.eps)) == ("0", "0", "-1/2")
