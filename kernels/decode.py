"""One token of the gated delta rule, for generation: the state in, the state out, in the layout of the scan."""

import torch
from torch import Tensor

from widthwise.kernels import checks
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

    Plain PyTorch: it differentiates, compiles, and can be captured in a CUDA graph. Computed in the state's dtype.
    """
    if not isinstance(q, Tensor) or q.dim() != 3:
        raise checks.wrong("q", checks.describe(q), "a tensor of shape [B, H, K]")
    checks.check_tokens(q, k, v, g, beta)
    checks.check_state("state", state, q.shape[0], q, v)
    if g.device.type == "cpu" and not torch.compiler.is_compiling():
        checks.check_gates(g)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
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
