"""The oracle: the gated delta rule one token at a time, in float64, differentiated by autograd.

Everything else in this room is tested against it, so it does nothing but spell the recurrence out.
"""

import torch
from torch import Tensor

L2_EPS = 1e-6  # FLA's: added to the sum of squares, so that a zero row stays finite


def l2_normalize(x: Tensor) -> Tensor:
    """``x * rsqrt(sum(x^2) + 1e-6)`` over the last axis (FLA's convention), any shape."""
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + L2_EPS)


def gated_delta_rule_reference(
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
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor | None]:
    """The recurrence itself, same arguments and shapes as :func:`widthwise.kernels.gated_delta_rule`.

    For each sequence and value head, with S of shape [K, V] and starting from ``initial_state`` or 0::

        S = exp(g_t) S;   u_t = beta_t (v_t - S^T k_t);   S = S + k_t u_t^T;   o_t = scale S^T q_t

    which is S_t = exp(g_t) S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T (Yang et al. 2024,
    arXiv:2412.06464, eq. 10) transposed. Inputs are first converted to ``dtype``, and o and the final state
    come back in it. Time and memory grow as T steps of autograd: for tests, not for training.
    """
    q, k, v, g, beta = (x.to(dtype) for x in (q, k, v, g, beta))
    batch, _, heads, key_dim = q.shape
    value_heads, value_dim = v.shape[2:]
    scale = key_dim**-0.5 if scale is None else scale
    if normalize_qk:
        q, k = l2_normalize(q), l2_normalize(k)
    # One q/k head serves value_heads / heads consecutive value heads.
    q, k = (x.repeat_interleave(value_heads // heads, dim=2) for x in (q, k))

    def scan(batch_slice: slice, time: slice, state: Tensor) -> tuple[list[Tensor], Tensor]:
        outputs = []
        for t in range(time.start, time.stop):
            q_t, k_t, v_t, g_t, beta_t = (x[batch_slice, t] for x in (q, k, v, g, beta))
            state = g_t.exp()[..., None, None] * state
            recalled = torch.einsum("bhkv,bhk->bhv", state, k_t)
            u_t = beta_t[..., None] * (v_t - recalled)
            state = state + k_t[..., :, None] * u_t[..., None, :]
            outputs.append(scale * torch.einsum("bhkv,bhk->bhv", state, q_t))
        return outputs, state

    bounds = [0, q.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    sequences = batch if cu_seqlens is None else len(bounds) - 1
    if initial_state is None:
        states = q.new_zeros(sequences, value_heads, key_dim, value_dim)
    else:
        states = initial_state.to(dtype)
    if cu_seqlens is None:
        outputs, final = scan(slice(None), slice(*bounds), states)
    else:
        outputs, finals = [], []
        for n in range(sequences):
            some, last = scan(slice(0, 1), slice(bounds[n], bounds[n + 1]), states[n : n + 1])
            outputs += some
            finals.append(last)
        final = torch.cat(finals)
    o = torch.stack(outputs, dim=1) if outputs else torch.zeros_like(v)
    return o, final if output_final_state else None
