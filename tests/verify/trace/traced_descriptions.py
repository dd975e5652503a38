"""The same models, described by hand."""

from __future__ import annotations

from widthwise.derive import Builder, Graph
from widthwise.derive.builder import Tensor
from widthwise.derive.laws import DECAY_RATE, ONES, TIME_STEP


def cnn() -> Graph:
    """A convolution is a linear map over channels and taps, whose taps and places are width-free."""
    g = Builder("cnn")
    n, m, hidden = g.dim("n", 1), g.dim("m", 1), g.dim("hidden", 1)
    places = g.dim("places")
    x = g.pointwise("relu", g.linear(g.input("x", g.dim("patch")), "first", n, bias=True))
    x = g.pointwise("relu", g.linear(x, "second", m, bias=True))
    x = g.op("broadcast", x, shape=g.input("where", m * places).shape)
    x = g.pointwise("relu", g.linear(x, "third", hidden, bias=True))
    g.cross_entropy(g.readout(x, "readout", g.dim("classes")))
    return g.build()


def resnet() -> Graph:
    """A convolution is as above; a batch norm divides each channel by its deviation over tokens and places."""
    g = Builder("resnet")
    n, inner = g.dim("n", 1), g.dim("inner", 1)

    def normed(x: Tensor, name: str) -> Tensor:
        channels = x.shape[-1]
        y = g.product(g.op("batch_norm", x, eps=1e-5), g.parameter(name, channels, law=ONES))
        return g.pointwise("relu", g.add(y, g.parameter(f"{name}_bias", channels)))

    def block(x: Tensor) -> Tensor:
        y = g.linear(normed(x, "norm_1"), "conv_1", inner)
        return g.residual(x, g.linear(normed(y, "norm_2"), "conv_2", n))

    x = g.repeat("layers", 3, block, g.linear(g.input("x", g.dim("patch")), "stem", n))
    g.cross_entropy(g.readout(normed(x, "norm"), "readout", g.dim("classes")))
    return g.build()


def qwen3_next() -> Graph:
    """Layers of gated delta and of gated attention, each with routed experts and a shared one; head dims stay."""
    g = Builder("qwen3_next")
    n, taps, experts, one = g.dim("n", 1), g.dim("taps"), g.dim("experts"), g.dim("one")
    heads, group, d_k, d_v = g.dim("H", 1), g.dim("G"), g.dim("d_k"), g.dim("d_v")
    kv, shared, d_head = g.dim("KV", 1), g.dim("R"), g.dim("d_head")
    ffn, ffn_shared = g.dim("ffn", 1), g.dim("ffn_shared", 1)

    def mlp(x: Tensor, kind: str) -> Tensor:
        h = g.norm(x, f"{kind}_mlp_norm")

        def expert(which: str, width: object, **how: object) -> Tensor:
            gate = g.pointwise("silu", g.linear(h, f"{kind}_{which}gate", width))  # type: ignore[arg-type]
            up = g.linear(h, f"{kind}_{which}up", width)  # type: ignore[arg-type]
            return g.linear(g.product(gate, up), f"{kind}_{which}down", n)

        routing = g.op("softmax", g.linear(h, f"{kind}_router", experts))
        routed = g.product(expert("expert_", ffn), routing, n)
        gate = g.pointwise("sigmoid", g.linear(h, f"{kind}_shared_by", one))
        return g.residual(x, g.add(routed, g.product(expert("shared_", ffn_shared), gate, n)))

    def delta(x: Tensor) -> Tensor:
        h = g.norm(x, "delta_norm")
        q, k, v = (
            g.reshape(g.pointwise("silu", g.conv1d(g.linear(h, f"{name}_proj", rows), f"{name}_conv1d", taps)), *split)
            for name, rows, split in (
                ("q", heads * d_k, (heads, d_k)),
                ("k", heads * d_k, (heads, d_k)),
                ("v", heads * group * d_v, (heads * group, d_v)),
            )
        )
        beta = g.pointwise("sigmoid", g.linear(h, "b_proj", heads * group))
        rate = g.pointwise("exp", g.parameter("A_log", heads * group, law=DECAY_RATE))
        z = g.add(g.linear(h, "a_proj", heads * group), g.parameter("dt_bias", heads * group, law=TIME_STEP))
        alpha = g.pointwise("exp", g.scale(g.product(rate, g.pointwise("softplus", z)), factor=-1.0))
        q, k = (g.norm(each, kind="l2_norm") for each in (q, k))
        o = g.scale(g.scan(q, k, v, decay=alpha, strength=beta, key_scale=True), multiplier="o_scale")
        gate = g.reshape(g.pointwise("silu", g.linear(h, "z_proj", heads * group * d_v)), heads * group, d_v)
        y = g.reshape(g.product(g.norm(o, "o_norm"), gate), heads * group * d_v)
        return mlp(g.residual(x, g.linear(y, "out_proj", n)), "delta")

    def attention(x: Tensor) -> Tensor:
        h = g.norm(x, "attn_norm")
        q = g.norm(g.reshape(g.linear(h, "attn_q", kv * shared * d_head), kv * shared, d_head), "q_norm")
        k = g.norm(g.reshape(g.linear(h, "attn_k", kv * d_head), kv, d_head), "k_norm")
        v = g.reshape(g.linear(h, "attn_v", kv * d_head), kv, d_head)
        o = g.reshape(g.attention(q, k, v), kv * shared * d_head)
        gated = g.product(o, g.pointwise("sigmoid", g.linear(h, "attn_gate", kv * shared * d_head)))
        return mlp(g.residual(x, g.linear(gated, "attn_o", n)), "attn")

    x = g.embedding("embed", g.dim("vocab"), n)
    x = g.repeat("layers", 48, lambda x: attention(delta(x)), x)
    g.cross_entropy(g.readout(g.norm(x, "norm"), "lm_head", g.dim("vocab")))
    return g.build()
