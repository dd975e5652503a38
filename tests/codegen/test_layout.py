"""Where nodes live: with their parameters, their readers, their block."""

import pytest

from widthwise.codegen.layout import blocks, containers
from widthwise.derive import Builder, architecture
from widthwise.derive.builder import Tensor

LAYER = "model.layers.*"


def test_a_gated_deltanet_has_its_mixer_its_mlp_and_its_stream_in_three_places() -> None:
    where = containers(architecture("gated_deltanet"))
    assert where["x"] == "model"
    assert where["x_final"] == "model"
    assert where["logits"] == where["loss"] == ""
    assert {where[name] for name in ("h", "x_mid", "h_mlp", "x_out", "rms_norm(x)", "rms_norm(x_mid)")} == {LAYER}
    mixer = ("z_q", "q_conv", "q", "q_normed", "beta", "g", "alpha", "o", "o_scaled", "o_normed", "silu(z_g)", "y")
    assert {where[name] for name in mixer} == {f"{LAYER}.attn"}
    assert {where[name] for name in ("z_gate", "silu(z_gate)", "z_up", "mlp_out")} == {f"{LAYER}.mlp"}
    assert len(where) == len(architecture("gated_deltanet").nodes)


def test_a_tied_readout_lives_at_the_root_although_its_table_does_not() -> None:
    where = containers(architecture("gated_deltanet", tied=True))
    assert (where["x"], where["logits"]) == ("model", "")


def test_a_residual_that_ends_a_layer_lives_in_it() -> None:
    assert containers(architecture("gated_deltanet", mlp=False))["x_mid"] == LAYER


def test_attention_without_a_parameter_of_its_own_lives_with_the_projections() -> None:
    where = containers(architecture("transformer"))
    assert {where[name] for name in ("q·k", "scores", "o", "softmax(scores)")} == {f"{LAYER}.attn"}


def test_layers_at_the_root() -> None:
    where = containers(architecture("mlp"))
    assert (where["x"], where["z_in"], where["relu(z_in)"], where["z"], where["relu(z)"]) == (
        "",
        "",
        "",
        "layers.*",
        "layers.*",
    )


def test_what_only_feeds_a_block_comes_before_it() -> None:
    g = Builder("scaled_embedding")
    n, vocab = g.dim("d_model", 1), g.dim("vocab")
    x = g.scale(g.embedding("model.embed", vocab, n), factor=2.0, output="x")
    x = g.repeat("model.layers", 2, lambda x: g.residual(x, g.linear(x, "ff.out", n), output="x_out"), x)
    g.cross_entropy(g.readout(x, "lm_head", vocab))
    graph = g.build()
    where = containers(graph)
    assert (where["x"], where["linear(x, out)"], where["x_out"]) == ("model", f"{LAYER}.ff", LAYER)
    ((path, (start, end, members)),) = blocks(graph).items()
    assert (path, start, end, members) == (("model", "layers", "*"), "x", "x_out", {"linear(x, out)", "x_out"})


def test_a_container_that_dataflow_leaves_and_enters_again_is_inlined() -> None:
    g = Builder("interleaved")
    n, classes = g.dim("n", 1), g.dim("classes")
    x = g.input("x", n)
    a = g.linear(x, "left.a_proj", n, output="a")
    b = g.linear(a, "right.b_proj", n, output="b")
    c = g.linear(b, "left.c_proj", n, output="c")
    g.cross_entropy(g.readout(c, "head", classes))
    where = containers(g.build())
    assert (where["a"], where["b"], where["c"]) == ("", "right", "")


def test_a_weight_borrowed_from_a_neighbour_is_used_where_both_can_be_reached() -> None:
    g = Builder("borrowed")
    n, vocab = g.dim("d_model", 1), g.dim("vocab")

    def layer(x: Tensor) -> Tensor:
        a = g.linear(x, "first.up", n, output="a")
        return g.linear(g.linear(a, "", n, tied_to="up", output="b"), "second.down", n, output="c")

    x = g.repeat("layers", 2, layer, g.embedding("embed", vocab, n, output="x"))
    g.cross_entropy(g.readout(x, "head", vocab))
    where = containers(g.build())
    assert (where["a"], where["b"], where["c"]) == ("layers.*.first", "layers.*", "layers.*.second")


@pytest.mark.parametrize(
    "name", ["gated_deltanet", "deltanet", "gated_linear_attention", "mamba2", "transformer", "mlp"]
)
def test_every_node_has_a_place(name: str) -> None:
    graph = architecture(name)
    assert set(containers(graph)) == {node.output for node in graph.nodes}
