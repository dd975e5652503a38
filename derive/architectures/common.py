"""What the language models share: scalings of heads, token embedding and readout, the gated MLP."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from sympy import Expr, Symbol

from widthwise.derive.builder import Builder, Tensor
from widthwise.derive.errors import unknown_name
from widthwise.derive.exponents import ONE, ZERO
from widthwise.derive.graph import Dim


class HeadScaling(NamedTuple):
    """How the model width splits: d_head ∝ n^head_dim and heads ∝ n^(1 − head_dim)."""

    head_dim: Expr
    heads: Expr


SCALINGS: dict[str, HeadScaling] = {
    "heads-fixed": HeadScaling(ONE, ZERO),
    "head-dim-fixed": HeadScaling(ZERO, ONE),
    "mixed": HeadScaling(Symbol("h"), ONE - Symbol("h")),
}


def head_scaling(name: str) -> HeadScaling:
    if name not in SCALINGS:
        raise unknown_name("scaling", name, list(SCALINGS))
    return SCALINGS[name]


def gated_mlp(g: Builder, x: Tensor, width: Dim, ffn: Dim) -> Tensor:
    """down( SiLU(gate x) · up x )."""
    gate = g.pointwise("silu", g.linear(x, "mlp.gate_proj", ffn, output="z_gate"))
    up = g.linear(x, "mlp.up_proj", ffn, output="z_up")
    return g.linear(g.product(gate, up), "mlp.down_proj", width, output="mlp_out")


def language_model(
    g: Builder, width: Dim, depth: int, tied: bool, mixer: Callable[[Tensor], Tensor], mlp: bool = True
) -> None:
    """Token embedding, ``depth`` pre-norm layers of a token mixer and a gated MLP, final norm, readout, loss."""
    vocabulary = g.dim("vocab")

    def layer(x: Tensor) -> Tensor:
        h = g.norm(x, "attn_norm", output="h")
        x = g.residual(x, mixer(h), output="x_mid")
        if not mlp:
            return x
        y = gated_mlp(g, g.norm(x, "mlp_norm", output="h_mlp"), width, g.dim("ffn", 1))
        return g.residual(x, y, output="x_out")

    x = g.embedding("model.embeddings", vocabulary, width, output="x")
    x = g.repeat("model.layers", depth, layer, x)
    logits = g.readout(
        g.norm(x, "model.norm", output="x_final"), "lm_head", vocabulary, tied_to="embeddings" if tied else None
    )
    g.cross_entropy(logits)
