"""The launches: two forward, two backward, and two more where dq and dk are finished apart.

``forward`` prepares every chunk at once (``triton_prepare``), then walks each sequence (``triton_sweep``).
``backward`` walks in both directions at once, then computes every chunk's gradients (``triton_gradients``). States are
recomputed, not kept: between the two passes there are only the preparation's matrices, about as many bytes as one of q,
k, v, and u, as many as v.
"""

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from widthwise.kernels import triton_launch as launch
from widthwise.kernels.triton_gradients import finish_kernel, gradients_kernel, normalize_kernel
from widthwise.kernels.triton_gradients_wide import wide_gradients_kernel
from widthwise.kernels.triton_launch import CHUNK, by_token
from widthwise.kernels.triton_prepare import ROWS, prepare_kernel
from widthwise.kernels.triton_split import dtransfer_kernel, join_kernel, transfer_kernel
from widthwise.kernels.triton_sweep import backward_kernel, forward_kernel


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, so make it ``device``."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _strides(**tensors: Tensor) -> dict[str, int]:
    return {f"{name}_{axis}": x.stride(i) for name, x in tensors.items() for i, axis in enumerate(("token", "head"))}


def _tiles(
    batch: launch.Batch, described: bool, blocks: dict[str, int], keys: tuple[Tensor, ...], values: tuple[Tensor, ...],
    squares: tuple[Tensor, ...], results: tuple[Tensor, ...], states: tuple[Tensor, ...],
) -> list[Any]:  # fmt: skip
    """What a kernel reads and writes tile by tile, in order: if ``described``, as descriptors for the copy engine, else
    as it is."""
    if not described:
        return [*keys, *values, *squares, *results, *states]
    block_k, block_v = blocks["BLOCK_K"], blocks["BLOCK_V"]
    return [
        *(launch.describe(x, batch, block_k) for x in keys),
        *(launch.describe(x, batch, block_v) for x in values),
        *(launch.describe_matrices(x, CHUNK, CHUNK) for x in squares),
        *(launch.describe(x.view(batch.tokens, *x.shape[-2:]), batch, block_v) for x in results),
        *(launch.describe_matrices(x, block_k, block_v) for x in states),
    ]


def saved_like(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, dtype: torch.dtype, keep: bool) -> tuple[Tensor, ...]:
    """Uninitialized (rows, inverse, attention, u, starts, maps), as ``forward`` saves them; see ``triton_prepare`` and
    ``triton_split`` for what they are. Without ``keep``, u has no tokens.

    starts [M, K, V] and maps [M, K, K] have room for every joint that there can be, whatever B and T are: a trace
    with a dynamic length must not decide by it.
    """
    key_dim, (heads, value_dim) = q.shape[-1], v.shape[2:]
    chunks = launch.chunk_bound(q.shape[0], q.shape[1], cu_seqlens)
    joints = launch.most_joints(key_dim, value_dim, launch.chip_of(q)) if cu_seqlens is None else 0
    return (
        q.new_empty(chunks, heads, ROWS.value, CHUNK, dtype=torch.float32),
        q.new_empty(chunks, heads, CHUNK, CHUNK, dtype=dtype),
        q.new_empty(chunks, heads, CHUNK, CHUNK, dtype=dtype),
        q.new_empty(q.shape[0] * q.shape[1] if keep else 0, heads, value_dim, dtype=dtype),
        q.new_empty(joints, key_dim, value_dim, dtype=torch.float32),
        q.new_empty(joints, key_dim, key_dim, dtype=torch.float32),
    )


def is_kept(saved: tuple[Tensor, ...]) -> bool:
    """Whether ``forward`` was to ``keep``."""
    return saved[3].shape[0] > 0


def _join(moved: Tensor, maps: Tensor, sequences: int, joints: int, heads: int, backwards: bool) -> None:
    """``moved``, of which the first are [sequences, joints, heads, K, V], in place: from what each segment adds to the
    states or gradients at the joints."""
    key_dim, value_dim = moved.shape[1:]
    join_kernel[(sequences * heads * triton.cdiv(value_dim, 16),)](
        moved, maps, joints, heads, key_dim, value_dim, launch.power_of_two(key_dim), 16,
        BACKWARDS=backwards, num_warps=4,
    )  # fmt: skip


def forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, normalize_qk: bool,
    *, short_keys: bool | None = None, key_scale: Tensor | None = None, keep: bool = True, wide: bool = False,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """o [B, T, HV, V] in q's dtype, final state [N, HV, K, V] fp32, and what ``backward`` needs of it.

    ``short_keys``: keys are no longer than 1, as normalized ones are. ``key_scale`` (one number, on the device):
    what k is to be multiplied by. ``wide``: o in fp32.
    """
    (_, _, heads, key_dim), (value_heads, value_dim) = q.shape, v.shape[2:]
    batch, chip = launch.lay_out(q, cu_seqlens), launch.chip_of(q)
    rows, inverse, attention, u, starts, maps = saved = saved_like(q, v, cu_seqlens, q.dtype, keep)
    o = q.new_empty(v.shape, dtype=torch.float32 if wide else q.dtype)
    final = q.new_empty(batch.sequences, value_heads, key_dim, value_dim, dtype=torch.float32)
    initial = None if initial_state is None else initial_state.contiguous()
    q, k, v, g, beta = (by_token(x) for x in (q, k, v, g, beta))
    sizes = {"HEADS": value_heads, "GROUP": value_heads // heads, "K": key_dim}
    varlen = {"VARLEN": cu_seqlens is not None}
    short_keys = normalize_qk if short_keys is None else short_keys
    with _on(q.device):
        prepare_kernel[(batch.chunks * value_heads,)](
            q, k, g, beta, key_scale, rows, inverse, attention, *batch.tables, batch.length, scale,
            **_strides(q=q, k=k, g=g, beta=beta), **sizes, **varlen, NORMALIZE=normalize_qk,
            SCALED=key_scale is not None, OPERAND=tl.float16 if short_keys and q.element_size() == 2 else tl.float32,
            **launch.prepare_blocks(key_dim),
        )  # fmt: skip
        blocks = launch.sweep_blocks(key_dim, value_dim, chip)
        described = launch.describable(q, cu_seqlens)
        tiles = _tiles(batch, described, blocks, (q, k), (v,), (inverse, attention), (u,) if keep else (), ())
        out = _tiles(batch, described and not wide, blocks, (), (), (), (o,), ())
        segments, span = launch.segments_of(batch, value_heads, key_dim, value_dim, chip)
        walk = {
            **_strides(q=q, k=k, v=v), **sizes, "V": value_dim, "INITIAL": initial is not None,
            **blocks, "DESCRIBED": described,
        }  # fmt: skip
        columns = triton.cdiv(value_dim, blocks["BLOCK_V"])
        if segments > 1:
            both = columns + triton.cdiv(key_dim, blocks["BLOCK_V"])
            transfer_kernel[(batch.sequences * (segments - 1) * value_heads * both,)](
                *tiles[:3], rows, *tiles[3:5], initial, starts, maps, batch.length, segments, span, **walk
            )
            _join(starts, maps, batch.sequences, segments - 1, value_heads, backwards=False)
        forward_kernel[(batch.sequences * segments * value_heads * columns,)](
            *tiles[:3], rows, *tiles[3:5], *out, tiles[5] if keep else rows, initial, starts if segments > 1 else rows,
            final, *batch.tables[:2], batch.length, segments, span, **walk, **varlen, WIDE=wide, KEEP=keep,
        )  # fmt: skip
    return o, final, saved


def backward(
    do: Tensor, dfinal_state: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, normalize_qk: bool, saved: tuple[Tensor, ...],
    *, parts: torch.dtype | None = None, least: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """(dq, dk, dv, dg, dbeta, dinitial_state), each in the shape and dtype of its input.

    With ``parts``, dq and dk are [B * T, HV, K], a value head each, for ``finish``, and dq of that type. ``least`` as
    in ``walk_backwards``.
    """
    (_, _, heads, key_dim), (value_heads, value_dim) = q.shape, v.shape[2:]
    group = value_heads // heads
    batch, chip = launch.lay_out(q, cu_seqlens), launch.chip_of(q)
    rows, inverse, attention, u, starts, maps = saved
    dq, dk, dv, dg, dbeta = (x.new_empty(x.shape) for x in (q, k, v, g, beta))
    dinitial = None if initial_state is None else initial_state.new_empty(initial_state.shape, dtype=torch.float32)
    initial = None if initial_state is None else initial_state.contiguous()
    dfinal = None if dfinal_state is None else dfinal_state.contiguous()
    q, k, v, g, beta, do = (by_token(x) for x in (q, k, v, g, beta, do))
    states, dstates = (q.new_empty(batch.chunks, value_heads, key_dim, value_dim) for _ in range(2))
    sizes = {"HEADS": value_heads, "GROUP": group, "K": key_dim, "V": value_dim}
    varlen = {"VARLEN": cu_seqlens is not None}
    strides = _strides(q=q, k=k, v=v, do=do)
    with _on(q.device):
        blocks = launch.sweep_blocks(key_dim, value_dim, chip)
        # dv holds dr, its gradient before beta, until the gradients turn it into dv in place.
        described = launch.describable(q, cu_seqlens)
        tiles = _tiles(batch, described, blocks, (q, k), (do, u), (inverse, attention), (dv,), (states, dstates))
        segments, span = launch.segments_of(batch, value_heads, key_dim, value_dim, chip)
        walks = batch.sequences * value_heads * triton.cdiv(value_dim, blocks["BLOCK_V"])
        dends = rows
        if segments > 1:
            dends = torch.empty_like(starts)
            dtransfer_kernel[(walks * (segments - 1),)](
                *tiles[:3], rows, *tiles[4:6], dfinal, dends, batch.length, segments, span, least,
                **_strides(q=q, k=k, do=do), **sizes, FINAL=dfinal is not None, **blocks, DESCRIBED=described,
            )  # fmt: skip
            _join(dends, maps, batch.sequences, segments - 1, value_heads, backwards=True)
        backward_kernel[(2 * walks * segments,)](
            *tiles[:4], rows, *tiles[4:], initial, starts if segments > 1 else rows, dfinal, dends, dinitial,
            *batch.tables[:2], batch.length, segments, span, least, **_strides(q=q, k=k, do=do), **sizes, **varlen,
            STATES_DEPTH=launch.states_depth(chip), INITIAL=initial is not None, FINAL=dfinal is not None,
            **blocks, DESCRIBED=described,
        )  # fmt: skip
        whole = group == 1 and parts is None
        in_parts = (batch.tokens, value_heads, key_dim)
        dq_parts = dq if whole else q.new_empty(in_parts, dtype=parts or q.dtype)
        dk_parts = dk if whole else q.new_empty(in_parts)
        # F and E fit where dq and dk will be, for most widths and types.
        width = key_dim if key_dim >= CHUNK else CHUNK
        pairs = (
            (dq_parts, dk_parts)
            if width == key_dim and dq_parts.dtype == q.dtype
            else q.new_empty(2, batch.tokens, value_heads, width)
        )
        gradients = {
            **strides, **sizes, **varlen, "PAIRS_WIDTH": width, "NORMALIZE": normalize_qk, "FINISH": whole,
        }  # fmt: skip
        if launch.is_wide(key_dim, value_dim, chip):
            blocks = launch.wide_gradient_blocks(key_dim, chip)
            tiles = _tiles(batch, described, blocks, (), (do, u, v), (), (dv,), (states, dstates))
            wide_gradients_kernel[(batch.chunks * value_heads,)](
                q, k, *tiles, rows, attention, *pairs, dq_parts, dk_parts, dg, dbeta,
                *batch.tables, batch.length, scale, **gradients, **blocks, DESCRIBED=described,
            )  # fmt: skip
        else:
            gradients_kernel[(batch.chunks * value_heads,)](
                q, k, v, do, u, dv, states, dstates, rows, attention, *pairs, dq_parts, dk_parts, dg, dbeta,
                *batch.tables, batch.length, scale, **gradients, **launch.gradient_blocks(key_dim, value_dim, chip),
            )  # fmt: skip
    if parts is not None:
        dq, dk = dq_parts, dk_parts
    elif not whole:
        dq, dk = (finish(x, y, like, group, normalize_qk) for x, y, like in ((q, dq_parts, dq), (k, dk_parts, dk)))
    return dq, dk, dv, dg, dbeta, dinitial


def finish(
    x: Tensor, parts: Tensor, dx: Tensor, group: int, normalized: bool, factor: Tensor | None = None, unit: bool = False
) -> Tensor:
    """dx, of the shape and type it has: ``parts`` [B * T, HV, K] summed over the value heads of a group, times
    ``factor`` (one number, on the device), and through the normalization of x [B, T, H, K], if it was normalized.

    ``unit``: parts are gradients of the normalized rows; else of rows times a constant, their reciprocal norm.
    """
    x = by_token(x) if x.dim() == 4 else x
    tokens, heads, key_dim = x.shape
    with _on(x.device):
        finish_kernel[(triton.cdiv(tokens, CHUNK) * heads,)](
            x, parts, dx, factor, tokens, **_strides(x=x), HEADS=heads, GROUP=group, K=key_dim,
            BLOCK_K=launch.power_of_two(key_dim), NORMALIZE=normalized, UNIT=unit, SCALED=factor is not None,
            num_warps=4,
        )  # fmt: skip
    return dx


def normalized(x: Tensor) -> Tensor:
    """Rows of x [B, T, H, K] over their norms, in fp16."""
    unit = torch.empty(x.shape, dtype=torch.float16, device=x.device)
    x = by_token(x)
    tokens, heads, key_dim = x.shape
    with _on(x.device):
        normalize_kernel[(triton.cdiv(tokens, CHUNK) * heads,)](
            x, unit, tokens, **_strides(x=x), HEADS=heads, K=key_dim, BLOCK_K=launch.power_of_two(key_dim), num_warps=4
        )
    return unit
