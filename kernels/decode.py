"""One token of the gated delta rule, for generation: the state in, the state out, in the layout of the scan."""

import torch
from torch import Tensor

from widthwise.kernels import checks
from widthwise.kernels.op import uses_triton
from widthwise.kernels.reference import l2_normalize


def gated_delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    *,
    scale: float | None = None,
    normalize_qk: bool = False,
) -> tuple[Tensor, Tensor]:
    """:func:`widthwise.kernels.gated_delta_rule` for one token of each of B sequences.

    Args:
        q, k: [B, H, K]; v: [B, HV, V]; g, beta: [B, HV], as there without the time axis.
        state: [B, HV, K, V] in fp32 (fp64 for fp64 inputs): the final state of the tokens before. It is not written to.
        scale, normalize_qk: as there.

    Returns:
        o [B, HV, V] in q's dtype, and the state after the token. T steps equal one call over T tokens.

    Raises:
        ValueError: for shapes, dtypes and devices, and, on the CPU, for g > 0.

    Computed in the state's dtype. It compiles, and can be captured in a CUDA graph. On the GPU it is one Triton kernel
    where no gradient is asked for; otherwise plain PyTorch, which differentiates as often as one likes.
    """
    if not isinstance(q, Tensor) or q.dim() != 3:
        raise checks.wrong("q", checks.describe(q), "a tensor of shape [B, H, K]")
    checks.check_tokens(q, k, v, g, beta)
    checks.check_state("state", state, q.shape[0], q, v)
    if g.device.type == "cpu" and not torch.compiler.is_compiling():
        checks.check_gates(g)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    differentiates = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, g, beta, state))
    fits = q.dtype in checks.TRITON_FLOATS and q.shape[-1] <= checks.TRITON_MAX_KEY
    if uses_triton(q) and fits and not differentiates:
        o, after = torch.ops.widthwise.gated_delta_rule_step(q, k, v, g, beta, state, scale, normalize_qk)
        return o, after
    return in_torch(q, k, v, g, beta, state, scale, normalize_qk)


def in_torch(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, scale: float, normalize_qk: bool
) -> tuple[Tensor, Tensor]:
    """The step, of checked arguments, in plain PyTorch."""
    out_dtype, groups = q.dtype, v.shape[1] // q.shape[1]
    q, k, v, g, beta = (x.to(state.dtype) for x in (q, k, v, g, beta))
    if normalize_qk:
        q, k = l2_normalize(q), l2_normalize(k)
    # [B, HV, 1, K] reads, [B, HV, K, 1] writes
    q, k = (x.repeat_interleave(groups, dim=1).unsqueeze(-2) for x in (q, k))
    with torch.autocast(state.device.type, enabled=False):
        state = g.exp()[..., None, None] * state
        u = beta[..., None, None] * (v.unsqueeze(-2) - k @ state)
        state = state + k.mT * u
        o = (q @ state).squeeze(-2) * scale
    return o.to(out_dtype), state


def _in_triton(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, scale: float, normalize_qk: bool
) -> tuple[Tensor, Tensor]:
    from widthwise.kernels import triton_step  # at its first use, or never

    return triton_step.step(q, k, v, g, beta, state, scale, normalize_qk)


def _fake(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, scale: float, normalize_qk: bool
) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), state.new_empty(state.shape)


# Registered without torch.library.custom_op, whose wrappers take 11 µs a call where this takes 3: a step is that short.
_NAME = "widthwise::gated_delta_rule_step"
torch.library.define(_NAME, torch.library.infer_schema(_in_triton, mutates_args=()))
torch.library.impl(_NAME, "default", _in_triton)
torch.library.register_fake(_NAME, _fake)
