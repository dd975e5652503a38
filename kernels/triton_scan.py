"""The gated delta rule on the GPU: two launches forward, three backward (one or two more with value groups).

``forward`` prepares every chunk at once (``triton_prepare``), then walks each sequence (``triton_sweep``).
``backward`` walks again in both directions at once, then computes every chunk's gradients (``triton_gradients``).
States are recomputed, not kept: between the two passes there are only the preparation's matrices, about as many bytes
as one of q, k, v.
"""

import contextlib
from contextlib import AbstractContextManager

import torch
import triton
import triton.language as tl
from torch import Tensor

from widthwise.kernels import triton_launch as launch
from widthwise.kernels.triton_gradients import finish_kernel, gradients_kernel
from widthwise.kernels.triton_launch import CHUNK, by_token
from widthwise.kernels.triton_prepare import prepare_kernel
from widthwise.kernels.triton_sweep import backward_kernel, forward_kernel


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, so make it ``device``."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _strides(**tensors: Tensor) -> dict[str, int]:
    return {f"{name}_{axis}": x.stride(i) for name, x in tensors.items() for i, axis in enumerate(("token", "head"))}


def _operand(q: Tensor) -> torch.dtype:
    """What the kernels compute in: q's dtype, except that Triton's interpreter has no bf16 dots."""
    return torch.float32 if q.dtype == torch.bfloat16 and q.device.type == "cpu" else q.dtype


def saved_like(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, normalize_qk: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Uninitialized (rows, inverse, attention), as ``forward`` saves them; see ``triton_prepare`` for what they are."""
    chunks, heads = launch.chunk_bound(q.shape[0], q.shape[1], cu_seqlens), v.shape[2]
    return (
        q.new_empty(chunks, heads, 6, CHUNK, dtype=torch.float32),
        q.new_empty(chunks, heads, CHUNK, CHUNK, dtype=_operand(q)),
        q.new_empty(chunks, heads, CHUNK, CHUNK, dtype=_operand(q)),
    )


def forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, normalize_qk: bool,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """o [B, T, HV, V] in q's dtype, final state [N, HV, K, V] fp32, and what ``backward`` needs of it."""
    if (operand := _operand(q)) != q.dtype:
        q, k, v = (x.to(operand) for x in (q, k, v))
        o, final, saved = forward(q, k, v, g, beta, scale, initial_state, cu_seqlens, normalize_qk)
        return o.to(torch.bfloat16), final, saved
    (_, _, heads, key_dim), (value_heads, value_dim) = q.shape, v.shape[2:]
    group = value_heads // heads
    batch = launch.lay_out(q, cu_seqlens)
    rows, inverse, attention = saved = saved_like(q, k, v, g, beta, scale, initial_state, cu_seqlens, normalize_qk)
    o = q.new_empty(v.shape)
    final = q.new_empty(batch.sequences, value_heads, key_dim, value_dim, dtype=torch.float32)
    initial = None if initial_state is None else initial_state.contiguous()
    q, k, v, g, beta = (by_token(x) for x in (q, k, v, g, beta))
    sizes = {"HEADS": value_heads, "GROUP": group, "K": key_dim, "VARLEN": cu_seqlens is not None}
    with _on(q.device):
        prepare_kernel[(batch.chunks * value_heads,)](
            q, k, g, beta, rows, inverse, attention, *batch.tables, batch.length, scale,
            **_strides(q=q, k=k, g=g, beta=beta), **sizes, NORMALIZE=normalize_qk,
            OPERAND=tl.float16 if normalize_qk and q.element_size() == 2 else tl.float32,
            **launch.prepare_blocks(key_dim),
        )  # fmt: skip
        states = batch.sequences * value_heads
        blocks = launch.sweep_blocks(states, key_dim, value_dim, q.element_size(), launch.processors(q))
        forward_kernel[(states * triton.cdiv(value_dim, blocks["BLOCK_V"]),)](
            q, k, v, beta, rows, inverse, attention, initial, final, o, *batch.tables[:2], batch.length,
            **_strides(q=q, k=k, v=v, beta=beta), **sizes, V=value_dim, INITIAL=initial is not None,
            **blocks,
        )  # fmt: skip
    return o, final, saved


def backward(
    do: Tensor, dfinal_state: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, normalize_qk: bool, saved: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """(dq, dk, dv, dg, dbeta, dinitial_state), each in the shape and dtype of its input."""
    if (operand := _operand(q)) != q.dtype:
        do, q, k, v = (x.to(operand) for x in (do, q, k, v))
        rest = (g, beta, scale, initial_state, cu_seqlens, normalize_qk, saved)
        dq, dk, dv, dg, dbeta, dinitial = backward(do, dfinal_state, q, k, v, *rest)
        return dq.to(torch.bfloat16), dk.to(torch.bfloat16), dv.to(torch.bfloat16), dg, dbeta, dinitial
    (_, _, heads, key_dim), (value_heads, value_dim) = q.shape, v.shape[2:]
    group = value_heads // heads
    batch = launch.lay_out(q, cu_seqlens)
    rows, inverse, attention = saved
    dq, dk, dv, dg, dbeta = (x.new_empty(x.shape) for x in (q, k, v, g, beta))
    dinitial = None if initial_state is None else initial_state.new_empty(initial_state.shape, dtype=torch.float32)
    initial = None if initial_state is None else initial_state.contiguous()
    dfinal = None if dfinal_state is None else dfinal_state.contiguous()
    q, k, v, g, beta, do = (by_token(x) for x in (q, k, v, g, beta, do))
    u = q.new_empty(batch.tokens, value_heads, value_dim)
    states, dstates = (q.new_empty(batch.chunks, value_heads, key_dim, value_dim) for _ in range(2))
    sizes = {"HEADS": value_heads, "GROUP": group, "K": key_dim, "V": value_dim, "VARLEN": cu_seqlens is not None}
    strides = _strides(q=q, k=k, v=v, beta=beta, do=do)
    with _on(q.device):
        walks = batch.sequences * value_heads
        blocks = launch.sweep_blocks(2 * walks, key_dim, value_dim, q.element_size(), launch.processors(q))
        # dv holds dr, its gradient before beta, until the gradients turn it into dv in place.
        backward_kernel[(2 * walks * triton.cdiv(value_dim, blocks["BLOCK_V"]),)](
            q, k, v, beta, do, rows, inverse, attention, initial, dfinal, dinitial, u, dv, states, dstates,
            *batch.tables[:2], batch.length, **strides, **sizes,
            INITIAL=initial is not None, FINAL=dfinal is not None, **blocks,
        )  # fmt: skip
        pairs = q.new_empty(batch.chunks, value_heads, 2, CHUNK, CHUNK)
        blocks = launch.gradient_blocks(key_dim, value_dim, q.element_size())
        finish = group == 1
        dq_parts, dk_parts = (dq, dk) if finish else (q.new_empty(batch.tokens, value_heads, key_dim) for _ in range(2))
        gradients_kernel[(batch.chunks * value_heads,)](
            q, k, v, beta, do, u, dv, states, dstates, rows, attention, pairs, dq_parts, dk_parts, dg, dbeta,
            *batch.tables, batch.length, scale, **strides, **sizes, NORMALIZE=normalize_qk, FINISH=finish,
            **blocks,
        )  # fmt: skip
        if not finish:
            for x, dx, parts in ((q, dq, dq_parts), (k, dk, dk_parts)):
                finish_kernel[(triton.cdiv(batch.tokens, CHUNK) * heads,)](
                    x, parts, dx, batch.tokens, **_strides(x=x), HEADS=heads, GROUP=group, K=key_dim,
                    BLOCK_K=launch.power_of_two(key_dim), NORMALIZE=normalize_qk, num_warps=4,
                )  # fmt: skip
    return dq, dk, dv, dg, dbeta, dinitial
