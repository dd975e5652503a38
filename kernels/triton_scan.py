"""The gated delta rule on the GPU: two launches forward, three backward (one or two more with value groups).

``forward`` prepares every chunk at once (``triton_prepare``), then walks each sequence (``triton_sweep``).
``backward`` walks again in both directions at once, then computes every chunk's gradients (``triton_gradients``).
States are recomputed, not kept: between the two passes there are only the preparation's matrices, about as many bytes
as one of q, k, v.
"""

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from widthwise.kernels import triton_launch as launch
from widthwise.kernels.reference import L2_EPS, l2_normalize
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


def _normalizes_first(q: Tensor, normalize_qk: bool) -> bool:
    """Whether q and k are normalized in memory: fp16 has no room for the reciprocal norm of a row that is near zero."""
    return normalize_qk and q.dtype == torch.float16


def _normalized(x: Tensor) -> Tensor:
    return l2_normalize(x.float()).to(x.dtype)


def _through_norm(x: Tensor, dx: Tensor) -> Tensor:
    """The gradient of ``x`` from that of ``_normalized(x)``."""
    wide, dwide = x.float(), dx.float()
    unit = torch.rsqrt(wide.square().sum(-1, keepdim=True) + L2_EPS)
    wide = wide * unit
    return (unit * (dwide - wide * (wide * dwide).sum(-1, keepdim=True))).to(x.dtype)


def _tiles(
    batch: launch.Batch, blocks: dict[str, int], keys: tuple[Tensor, ...], values: tuple[Tensor, ...],
    squares: tuple[Tensor, ...],
) -> tuple[bool, list[Any]]:  # fmt: skip
    """What a walk reads tile by tile, in order: as descriptors for the copy engine and True, or as it is and False."""
    if batch.cu_seqlens is not None or not launch.describable(*keys, *values):
        return False, [*keys, *values, *squares]
    return True, [
        *(launch.describe(x, batch, blocks["BLOCK_K"]) for x in keys),
        *(launch.describe(x, batch, blocks["BLOCK_V"]) for x in values),
        *(launch.describe_squares(x) for x in squares),
    ]


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
    if _normalizes_first(q, normalize_qk):
        q, k = _normalized(q), _normalized(k)
        return forward(q, k, v, g, beta, scale, initial_state, cu_seqlens, False)
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
            **launch.prepare_blocks(key_dim, q.element_size()),
        )  # fmt: skip
        states = batch.sequences * value_heads
        blocks = launch.sweep_blocks(states, key_dim, value_dim, q.element_size(), launch.chip_of(q))
        described, tiles = _tiles(batch, blocks, (q, k), (v,), saved[1:])
        forward_kernel[(states * triton.cdiv(value_dim, blocks["BLOCK_V"]),)](
            *tiles[:3], beta, rows, *tiles[3:], initial, final, o, *batch.tables[:2], batch.length,
            **_strides(q=q, k=k, v=v, beta=beta), **sizes, V=value_dim, INITIAL=initial is not None,
            **blocks, DESCRIBED=described,
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
    if _normalizes_first(q, normalize_qk):
        unit_q, unit_k = _normalized(q), _normalized(k)
        dq, dk, dv, dg, dbeta, dinitial = backward(
            do, dfinal_state, unit_q, unit_k, v, g, beta, scale, initial_state, cu_seqlens, False, saved
        )
        return _through_norm(q, dq), _through_norm(k, dk), dv, dg, dbeta, dinitial
    (_, _, heads, key_dim), (value_heads, value_dim) = q.shape, v.shape[2:]
    group = value_heads // heads
    batch, chip = launch.lay_out(q, cu_seqlens), launch.chip_of(q)
    rows, _, attention = saved
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
        blocks = launch.sweep_blocks(2 * walks, key_dim, value_dim, q.element_size(), chip)
        described, tiles = _tiles(batch, blocks, (q, k), (v, do), saved[1:])
        # dv holds dr, its gradient before beta, until the gradients turn it into dv in place.
        backward_kernel[(2 * walks * triton.cdiv(value_dim, blocks["BLOCK_V"]),)](
            *tiles[:3], beta, tiles[3], rows, *tiles[4:], initial, dfinal, dinitial, u, dv, states, dstates,
            *batch.tables[:2], batch.length, **strides, **sizes,
            INITIAL=initial is not None, FINAL=dfinal is not None, **blocks, DESCRIBED=described,
        )  # fmt: skip
        # F and E fit where dq and dk will be, for most widths.
        width = key_dim if key_dim >= CHUNK else CHUNK
        blocks = launch.gradient_blocks(key_dim, value_dim, q.element_size(), chip)
        finish = group == 1
        dq_parts, dk_parts = (dq, dk) if finish else (q.new_empty(batch.tokens, value_heads, key_dim) for _ in range(2))
        pairs = (dq_parts, dk_parts) if width == key_dim else q.new_empty(2, batch.tokens, value_heads, width)
        gradients_kernel[(batch.chunks * value_heads,)](
            q, k, v, beta, do, u, dv, states, dstates, rows, attention, *pairs, dq_parts, dk_parts, dg, dbeta,
            *batch.tables, batch.length, scale, **strides, **sizes, PAIRS_WIDTH=width,
            NORMALIZE=normalize_qk, FINISH=finish, **blocks,
        )  # fmt: skip
        if not finish:
            for x, dx, parts in ((q, dq, dq_parts), (k, dk, dk_parts)):
                finish_kernel[(triton.cdiv(batch.tokens, CHUNK) * heads,)](
                    x, parts, dx, batch.tokens, **_strides(x=x), HEADS=heads, GROUP=group, K=key_dim,
                    BLOCK_K=launch.power_of_two(key_dim), NORMALIZE=normalize_qk, num_warps=4,
                )  # fmt: skip
    return dq, dk, dv, dg, dbeta, dinitial
