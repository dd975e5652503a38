"""A pre-norm Transformer language model; the attention scale is derived, not given."""

from __future__ import annotations

from widthwise.derive.architectures.common import head_scaling, language_model
from widthwise.derive.builder import Builder, Tensor
from widthwise.derive.graph import Graph, as_group


def transformer(
    *, scaling: str = "heads-fixed", tied: bool = False, gqa: bool = False, qk_norm: bool = False, depth: int = 24
) -> Graph:
    """Softmax attention with H heads of d_head; with ``gqa`` a fixed group of query heads shares keys and values."""
    split = head_scaling(scaling)
    g = Builder("transformer", title="Transformer", scaling=scaling, tied=tied, gqa=gqa, qk_norm=qk_norm)
    width = g.dim("d_model", 1)
    heads, group = g.dim("H", split.heads), g.dim("G")
    head_dim = g.dim("d_head", split.head_dim, practical=256)
    queries = heads * group if gqa else as_group(heads)

    def mixer(h: Tensor) -> Tensor:
        q = g.reshape(g.linear(h, "attn.q_proj", queries * head_dim), queries, head_dim, output="q")
        k = g.reshape(g.linear(h, "attn.k_proj", heads * head_dim), heads, head_dim, output="k")
        v = g.reshape(g.linear(h, "attn.v_proj", heads * head_dim), heads, head_dim, output="v")
        if qk_norm:
            q, k = g.norm(q, "attn.q_norm", output="q_normed"), g.norm(k, "attn.k_norm", output="k_normed")
        o = g.attention(q, k, v, scores="scores", output="o")
        return g.linear(g.reshape(o, queries * head_dim), "attn.o_proj", width, output="y")

    language_model(g, width, depth, tied, mixer)
    return g.build()
