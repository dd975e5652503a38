"""Gated DeltaNet and its kin: one token mixer whose parts can be left out."""

from __future__ import annotations

from widthwise.derive.architectures.common import head_scaling, language_model
from widthwise.derive.builder import Builder, Tensor
from widthwise.derive.errors import DeriveError
from widthwise.derive.graph import Dim, Graph, Group, as_group
from widthwise.derive.laws import DECAY_RATE, ONES, TIME_STEP


def _key_scale(qk_scale: str) -> bool:
    """1 as in the papers, or d_k^(-1/2) as in FLA and Qwen3-Next."""
    scales = {"1": False, "d_k^-1/2": True}
    if qk_scale not in scales:
        raise DeriveError(f"qk_scale {qk_scale!r} is unknown", cure=f"known: {', '.join(scales)}")
    return scales[qk_scale]


def _features(
    g: Builder,
    h: Tensor,
    which: str,
    axes: Group,
    split: tuple[Dim | Group, ...],
    activation: bool,
    conv: bool,
    taps: Dim,
) -> Tensor:
    """SiLU(conv(W h)), split into heads; either step can be left out."""
    z = g.linear(h, f"attn.{which}_proj", axes, output=f"z_{which}")
    if conv:
        z = g.conv1d(z, f"attn.{which}_conv1d", taps, output=f"{which}_conv")
    if activation:
        z = g.pointwise("silu", z)
    return g.reshape(z, *split, output=which)


def gated_deltanet(
    *,
    scaling: str = "heads-fixed",
    tied: bool = False,
    activation: bool = True,
    conv: bool = True,
    gate: bool = True,
    decay: bool = True,
    o_scale: bool = True,
    qk_scale: str = "1",
    expand_v: bool = True,
    value_groups: bool = False,
    mlp: bool = True,
    depth: int = 24,
    name: str = "gated_deltanet",
    title: str = "GatedDeltaNet",
) -> Graph:
    """The whole Gated DeltaNet language model as every implementation computes it (Yang et al. 2024,
    arXiv:2412.06464; scaling analysed by Liu & Gu 2026, arXiv:2606.04048).

    Args:
        scaling: heads-fixed (head dims grow), head-dim-fixed (heads grow) or mixed (d_k ∝ n^h, H ∝ n^(1-h)).
        tied: readout tied to the token embedding.
        activation: SiLU on q, k, v. conv: short convolution on q, k, v.
        gate: output gate SiLU(W_g h). decay: the gate α; without it the model is DeltaNet.
        o_scale: a multiplier in front of the output norm, solved for.
        qk_scale: "1" or "d_k^-1/2".
        expand_v: d_v = 2 d_k rather than d_v = d_k: a constant, so it names an axis and moves no exponent.
        value_groups: several value heads share one q, k head (a width-free number of them).
    """
    split = head_scaling(scaling)
    g = Builder(
        name,
        title=title,
        scaling=scaling,
        tied=tied,
        activation=activation,
        conv=conv,
        gate=gate,
        decay=decay,
        o_scale=o_scale,
        qk_scale=qk_scale,
        expand_v=expand_v,
        value_groups=value_groups,
        mlp=mlp,
    )
    width, taps = g.dim("d_model", 1), g.dim("taps")
    heads = g.dim("H", split.heads)
    d_k = g.dim("d_k", split.head_dim, practical=256)
    d_v = g.dim("d_v", split.head_dim, practical=512) if expand_v else g.dim("d_v", split.head_dim, practical=256)
    value_heads = heads * g.dim("G") if value_groups else as_group(heads)

    def mixer(h: Tensor) -> Tensor:
        q = _features(g, h, "q", heads * d_k, (heads, d_k), activation, conv, taps)
        k = _features(g, h, "k", heads * d_k, (heads, d_k), activation, conv, taps)
        v = _features(g, h, "v", value_heads * d_v, (value_heads, d_v), activation, conv, taps)
        q, k = (
            g.norm(q, kind="l2_norm", eps=1e-6, output="q_normed"),
            g.norm(k, kind="l2_norm", eps=1e-6, output="k_normed"),
        )
        beta = g.pointwise("sigmoid", g.linear(h, "attn.b_proj", value_heads, output="z_beta"), output="beta")
        alpha = None
        if decay:
            rate = g.pointwise("exp", g.parameter("attn.A_log", value_heads, law=DECAY_RATE))
            z = g.add(
                g.linear(h, "attn.a_proj", value_heads, output="z_a"),
                g.parameter("attn.dt_bias", value_heads, law=TIME_STEP),
                output="z_alpha",
            )
            log_alpha = g.scale(g.product(rate, g.pointwise("softplus", z)), factor=-1.0, output="g")
            alpha = g.pointwise("exp", log_alpha, output="alpha")
        o = g.scan(q, k, v, decay=alpha, strength=beta, key_scale=_key_scale(qk_scale), state="S", output="o")
        return _output(g, h, o, value_heads, d_v, width, gate, o_scale)

    language_model(g, width, depth, tied, mixer, mlp)
    return g.build()


def _output(g: Builder, h: Tensor, o: Tensor, heads: Group, d_v: Dim, width: Dim, gate: bool, o_scale: bool) -> Tensor:
    """W_o( RMSNorm_head(multiplier · o) · SiLU(W_g h) )."""
    if o_scale:
        o = g.scale(o, multiplier="o_scale", output="o_scaled")
    y = g.norm(o, "attn.o_norm", output="o_normed")
    if gate:
        z = g.linear(h, "attn.g_proj", heads * d_v, output="z_g")
        y = g.product(y, g.reshape(g.pointwise("silu", z), heads, d_v))
    return g.linear(g.reshape(y, heads * d_v), "attn.o_proj", width, output="y")


def deltanet(
    *,
    scaling: str = "heads-fixed",
    tied: bool = False,
    activation: bool = True,
    conv: bool = True,
    gate: bool = False,
    o_scale: bool = True,
    qk_scale: str = "1",
    depth: int = 24,
) -> Graph:
    """DeltaNet (Yang et al. 2024, arXiv:2406.06484): Gated DeltaNet without decay and without output gate."""
    return gated_deltanet(
        scaling=scaling,
        tied=tied,
        activation=activation,
        conv=conv,
        gate=gate,
        decay=False,
        o_scale=o_scale,
        qk_scale=qk_scale,
        depth=depth,
        name="deltanet",
        title="DeltaNet",
    )


def gated_linear_attention(
    *, scaling: str = "heads-fixed", tied: bool = False, o_scale: bool = True, depth: int = 24
) -> Graph:
    """Gated linear attention (Yang et al. 2023, arXiv:2312.06635): a decay per key channel from a low-rank map."""
    split = head_scaling(scaling)
    g = Builder("gated_linear_attention", title="GatedLinearAttention", scaling=scaling, tied=tied, o_scale=o_scale)
    width, rank, heads = g.dim("d_model", 1), g.dim("rank"), g.dim("H", split.heads)
    d_k, d_v = (g.dim(each, split.head_dim, practical=256) for each in ("d_k", "d_v"))

    def mixer(h: Tensor) -> Tensor:
        q, k = (g.reshape(g.linear(h, f"attn.{each}_proj", heads * d_k), heads, d_k, output=each) for each in "qk")
        v = g.reshape(g.linear(h, "attn.v_proj", heads * d_v), heads, d_v, output="v")
        z = g.linear(g.linear(h, "attn.gk_down", rank), "attn.gk_up", heads * d_k, bias=True, output="z_alpha")
        alpha = g.reshape(g.pointwise("sigmoid", z), heads, d_k, output="alpha")
        o = g.scan(q, k, v, decay=alpha, key_scale=True, state="S", output="o")
        return _output(g, h, o, as_group(heads), d_v, width, True, o_scale)

    language_model(g, width, depth, tied, mixer)
    return g.build()


def mamba2(*, scaling: str = "head-dim-fixed", tied: bool = False, conv: bool = True, depth: int = 24) -> Graph:
    """Mamba-2 (Dao & Gu 2024, arXiv:2405.21060): one B, C of a fixed state size for all heads, Δ writes and decays,
    a skip D·x, a gated norm over the whole inner width."""
    split = head_scaling(scaling)
    g = Builder("mamba2", title="Mamba2", scaling=scaling, tied=tied, conv=conv)
    width, taps, state = g.dim("d_model", 1), g.dim("taps"), g.dim("d_state")
    heads, d_head = g.dim("H", split.heads), g.dim("d_head", split.head_dim, practical=256)

    def mixer(h: Tensor) -> Tensor:
        def part(which: str, axes: Dim | Group) -> Tensor:
            z = g.linear(h, f"mixer.{which}_proj", axes, output=f"z_{which}")
            return g.pointwise(
                "silu", g.conv1d(z, f"mixer.{which}_conv1d", taps, output=f"{which}_conv") if conv else z
            )

        v = g.reshape(part("x", heads * d_head), heads, d_head, output="v")
        k, q = g.reshape(part("B", state), state, output="k"), g.reshape(part("C", state), state, output="q")
        z_dt = g.add(
            g.linear(h, "mixer.dt_proj", heads, output="z_dt_proj"),
            g.parameter("mixer.dt_bias", heads, law=TIME_STEP),
            output="z_dt",
        )
        dt = g.pointwise("softplus", z_dt, output="dt")
        rate = g.pointwise("exp", g.parameter("mixer.A_log", heads, law=DECAY_RATE))
        alpha = g.pointwise("exp", g.scale(g.product(rate, dt), factor=-1.0), output="alpha")
        o = g.scan(q, k, v, decay=alpha, strength=dt, erase=False, state="S", output="o")
        skip = g.product(v, g.parameter("mixer.D", heads, law=ONES), heads, d_head)
        o = g.reshape(g.add(o, skip), heads * d_head)
        gate = g.pointwise("silu", g.linear(h, "mixer.z_proj", heads * d_head))
        y = g.norm(g.product(o, gate), "mixer.gated_norm", output="o_normed")
        return g.linear(y, "mixer.out_proj", width, output="y")

    language_model(g, width, depth, tied, mixer, mlp=False)
    return g.build()
