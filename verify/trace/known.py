"""Stand-ins for the functions of FLA and transformers that hide a kernel or a loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from widthwise.derive.errors import DeriveError
from widthwise.verify.trace.standins import expert_linear, mix, rotate, scan, stand_in

STATEFUL = ("initial_state", "initial_states", "cu_seqlens", "seq_idx", "head_first", "z")


def _plain(given: dict[str, Any]) -> None:
    """Refuse what a stand-in would otherwise pass over in silence: states, packed sequences, other layouts and gates.

    Raises:
        DeriveError: for one that is given.
    """
    if told := [name for name in STATEFUL if given.get(name) is not None and given[name] is not False]:
        raise DeriveError(f"a scan with {', '.join(told)}", cure="trace it without, or register a stand-in of its own")


@stand_in(
    "transformers.models.*:torch_chunk_gated_delta_rule",
    "transformers.models.*:torch_recurrent_gated_delta_rule",
    "transformers.models.*:chunk_gated_delta_rule",
    "transformers.models.*:fused_recurrent_gated_delta_rule",
)
def transformers_gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    use_qk_l2norm_in_kernel: bool = False,
    **rest: Any,
) -> tuple[Tensor, None]:
    _plain(rest)
    return scan(query, key, value, g, beta, None, use_qk_l2norm_in_kernel), None


@stand_in("widthwise.kernels*:gated_delta_rule")
def own_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    normalize_qk: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, None]:
    if initial_state is not None or output_final_state or cu_seqlens is not None:
        raise DeriveError("a scan that carries a state or packs sequences", cure="trace it without")
    return scan(q, k, v, g, beta, scale, normalize_qk), None


@stand_in("fla.*:chunk_gated_delta_rule", "fla.*:fused_recurrent_gated_delta_rule")
def fla_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    **rest: Any,
) -> tuple[Tensor, None]:
    _plain(rest)
    return scan(q, k, v, g, beta, scale, use_qk_l2norm_in_kernel), None


@stand_in("transformers.models.*:mamba2_chunk_scan", "transformers.models.*:mamba_chunk_scan_combined")
def mamba2_chunk_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    **rest: Any,
) -> Tensor:
    _plain(rest)
    if tuple(dt_limit) != (0.0, float("inf")) or not dt_softplus:
        raise DeriveError(
            f"time steps limited to {dt_limit}, softplus {dt_softplus}", cure="register a stand-in of its own"
        )
    if dt_bias is not None:
        dt = dt + dt_bias
    dt = torch.nn.functional.softplus(dt)
    y = scan(C, B, hidden_states, A * dt, dt, 1.0, False, False)
    return y if D is None else y + hidden_states * D[..., None]


@stand_in("transformers.activations:NewGELUActivation.forward")
def tanh_gelu(self: Any, input: Tensor) -> Tensor:
    return torch.nn.functional.gelu(input, approximate="tanh")


@stand_in("transformers.models.*:apply_rotary_pos_emb")
def apply_rotary_pos_emb(q: Tensor, k: Tensor, *angles: Any, **rest: Any) -> tuple[Tensor, Tensor]:
    return rotate(q), rotate(k)


@stand_in("transformers.models.*:*Experts.forward")
def experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *rest: Any) -> Tensor:
    up_and_gate, down, width = self.gate_up_proj.shape, self.down_proj.shape, hidden_states.shape[-1]
    usual = getattr(type(self), "_apply_gate", None)
    if (
        hasattr(self, "gate_up_proj_bias")
        or (up_and_gate[-1], down[-2]) != (width, width)
        or up_and_gate[-2] != 2 * down[-1]
        or getattr(usual, "__name__", "_default_apply_gate") != "_default_apply_gate"
    ):
        raise DeriveError(
            f"{type(self).__name__} is no gated MLP of weights [experts, 2 ffn, d], [experts, d, ffn]",
            cure="register a stand-in of its own for its forward",
        )
    gate, up = expert_linear(hidden_states, self.gate_up_proj).chunk(2, dim=-1)
    y = expert_linear(self.act_fn(gate) * up, self.down_proj)
    return mix(y, top_k_weights)


@stand_in("transformers.models.*:*TopKRouter.forward")
def router(self: Any, hidden_states: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    logits = torch.nn.functional.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
    probabilities = torch.softmax(logits, -1)
    return logits, probabilities, torch.zeros_like(logits, dtype=torch.long)
