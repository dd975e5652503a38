"""Descriptions that no architecture of ours has, each with something that a generated model must get right."""

from widthwise.derive import Builder, Graph
from widthwise.derive.builder import Tensor
from widthwise.derive.graph import as_group
from widthwise.derive.laws import ONES, UNIT_NORMAL


def interleaved() -> Graph:
    """Dataflow leaves a module and enters it again."""
    g = Builder("interleaved", title="Interleaved")
    n, vocab = g.dim("d_model", 1), g.dim("vocab")
    x = g.embedding("embed", vocab, n, output="x")
    a = g.pointwise("tanh", g.linear(x, "left.one", n, bias=True))
    b = g.pointwise("gelu", g.linear(a, "right.two", n))
    c = g.linear(b, "left.three", n, bias=True, output="c")
    g.cross_entropy(g.readout(g.norm(c, "final"), "head", vocab))
    return g.build()


def borrowed() -> Graph:
    """A weight and a gain used by two modules, and a block whose input is read after it."""
    g = Builder("borrowed", title="Borrowed")
    n, vocab = g.dim("d_model", 1), g.dim("vocab")
    x = g.embedding("embed", vocab, n, output="x")

    def layer(x: Tensor) -> Tensor:
        gain = g.parameter("shared_gain", n, law=ONES)
        a = g.linear(g.norm(x, gain), "first.up", n)
        b = g.linear(g.pointwise("relu", g.norm(a, gain)), "", n, tied_to="up")
        return g.residual(x, g.linear(g.pointwise("silu", b), "second.down", n))

    y = g.repeat("layers", 2, layer, x)
    y = g.residual(g.norm(y, kind="layer_norm"), x, output="sum")
    g.cross_entropy(g.readout(g.norm(y, "final", kind="layer_norm"), "head", vocab))
    return g.build()


def broadcast() -> Graph:
    """Products that lack axes, parameters used entrywise in front of a linear map, a gain of two axes."""
    g = Builder("broadcast", title="Broadcast")
    n, vocab = g.dim("d_model", 1), g.dim("vocab")
    H, K = g.dim("H"), g.dim("K", 1)

    def layer(x: Tensor) -> Tensor:
        h = g.norm(x, "norm")
        v = g.reshape(g.linear(h, "mix.v_proj", H * K), H, K, output="v")
        gate = g.pointwise("sigmoid", g.linear(h, "mix.gate", H, bias=True))
        shared = g.pointwise("silu", g.linear(h, "mix.shared", K))
        o = g.product(g.product(v, gate, H, K), shared, H, K)
        o = g.add(o, g.product(v, g.parameter("mix.D", H, law=ONES), H, K))
        o = g.norm(o, g.parameter("mix.gains", H, K, law=ONES))
        inner = g.contract(o, g.norm(v, kind="l2_norm", eps=1e-6), H)
        o = g.product(o, g.pointwise("tanh", g.scale(inner, factor=0.25)), H, K)
        return g.residual(x, g.linear(g.reshape(o, H * K), "mix.out", n))

    x = g.product(g.embedding("embed", vocab, n), g.parameter("sizes_of_x", n, law=ONES), output="x")
    x = g.repeat("layers", 2, layer, x)
    g.cross_entropy(g.readout(g.norm(x, "final"), "head", vocab))
    return g.build()


def scanned(normalized: str = "both") -> Graph:
    """A scan right in its block, beside a frozen table: sigmoid decay, and keys that may be normed outside of it."""
    g = Builder("scanned", title="Scanned", normalized=normalized)
    n, vocab, taps = g.dim("d_model", 1), g.dim("vocab"), g.dim("taps")
    H, K, V = g.dim("H"), g.dim("K", 1), g.dim("V", 1)

    def layer(x: Tensor) -> Tensor:
        h = g.norm(g.conv1d(x, "short", taps), "norm")
        q, k = (g.reshape(g.linear(h, f"{which}_proj", H * K), H, K) for which in "qk")
        v = g.reshape(g.linear(h, "v_proj", H * V), H, V)
        k = g.norm(k, kind="l2_norm", eps=1e-6, output="unit_k")
        if normalized == "both":
            q = g.norm(q, kind="l2_norm", eps=1e-6)
        f = g.pointwise("sigmoid", g.linear(h, "f_proj", H))
        beta = g.pointwise("sigmoid", g.linear(h, "beta_proj", H))
        o = g.scan(q, k, v, decay=f, strength=beta)
        return g.residual(x, g.linear(g.reshape(g.norm(o), H * V), "out", n))

    x = g.repeat("blocks", 2, layer, g.embedding("embed", vocab, n, trainable=False, output="x"))
    g.cross_entropy(g.readout(g.norm(x, "final"), "head", vocab))
    return g.build()


def constant_decay() -> Graph:
    """One decay and one strength a head for all tokens: gates that come of parameters alone."""
    g = Builder("constant_decay", title="ConstantDecay")
    n, vocab = g.dim("d_model", 1), g.dim("vocab")
    H, K, V = g.dim("H"), g.dim("K", 1), g.dim("V", 1)

    def layer(x: Tensor) -> Tensor:
        h = g.norm(x, "norm")
        q, k = (g.norm(g.reshape(g.linear(h, f"{w}_proj", H * K), H, K), kind="l2_norm", eps=1e-6) for w in "qk")
        v = g.reshape(g.linear(h, "v_proj", H * V), H, V)
        decay, strength = (g.pointwise("sigmoid", g.parameter(name, H)) for name in ("decay", "strength"))
        return g.residual(x, g.linear(g.reshape(g.scan(q, k, v, decay=decay, strength=strength), H * V), "out", n))

    x = g.repeat("blocks", 2, layer, g.embedding("embed", vocab, n, output="x"))
    g.cross_entropy(g.readout(g.norm(x, "final"), "head", vocab))
    return g.build()


def two_lists() -> Graph:
    """Two lists of layers, tensors that are called as things in the file are, a module with two outputs."""
    g = Builder("two_lists", title="TwoLists")
    n, vocab = g.dim("d_model", 1), g.dim("vocab")

    def layer(name: str) -> "type[Tensor]":
        def inner(x: Tensor) -> Tensor:
            h = g.norm(x, f"{name}_norm", output=f"h_{name}")
            return g.residual(x, g.linear(g.pointwise("silu", g.linear(h, f"ff.{name}_up", n)), f"ff.{name}_down", n))

        return inner  # type: ignore[return-value]

    x = g.embedding("net.embed", vocab, n, output="F")
    x = g.repeat("net.early", 1, layer("early"), x)  # type: ignore[arg-type]
    x = g.norm(x, "net.middle", output="torch")
    x = g.repeat("net.late", 1, layer("late"), x)  # type: ignore[arg-type]
    z = g.linear(x, "split.stem", n, output="self")
    a = g.linear(z, "split.a_proj", n, output="layer")
    b = g.linear(z, "split.b_proj", n, output="cache")
    y = g.product(g.pointwise("sigmoid", a), b, output="tokens")
    g.cross_entropy(g.readout(g.norm(y, "final", output="config"), "head", vocab, output="loss_"))
    return g.build()


def shared_table() -> Graph:
    """A learned vector added to a stream, and an MLP in the root."""
    g = Builder("shared_table", title="SharedTable")
    n, ffn, vocab = g.dim("d_model", 1), g.dim("ffn", 1), g.dim("vocab")
    x = g.embedding("embed", vocab, n)
    x = g.add(x, g.product(x, g.parameter("offset", n, law=UNIT_NORMAL)))
    h = g.linear(g.pointwise("relu", g.linear(x, "up", ffn)), "down", as_group(n))
    g.cross_entropy(g.readout(g.norm(h, "final"), "head", vocab, tied_to="embed"))
    return g.build()
