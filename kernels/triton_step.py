"""One token on the GPU in one launch: the state is read once and written once, and nothing else of its size exists.

Both sums over K, what the token recalls and what it reads, run over the state as it was loaded, so that they are ready
together and a program waits for memory once (y^T is a transpose, e = exp(g), unit lengths taken as 1/|q| and 1/|k|)::

    u = beta (v - e S^T k),   S' = e S + k u^T,   o = scale S'^T q = scale (e S^T q + (q . k) u)
"""

import contextlib
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

L2_EPS = tl.constexpr(1e-6)
STRIDES = [f"{name}_{axis}" for name in ("q", "k", "v", "g", "beta") for axis in ("batch", "head")]


@triton.jit(do_not_specialize=STRIDES)
def step_kernel(
    q, k, v, g, beta, state, o, after, scale,
    q_batch, q_head, k_batch, k_head, v_batch, v_head, g_batch, g_head, beta_batch, beta_head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, NORMALIZE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """A program has one value head of one sequence and BLOCK_V of its value channels."""
    walk = tl.program_id(0) // tl.cdiv(V, BLOCK_V)
    columns = tl.program_id(0) % tl.cdiv(V, BLOCK_V) * BLOCK_V + tl.arange(0, BLOCK_V)
    rows = tl.arange(0, BLOCK_K)
    in_k, in_v = rows < K, columns < V
    tile = walk.to(tl.int64) * (K * V) + rows[:, None] * V + columns[None, :]
    inside = in_k[:, None] & in_v[None, :]
    before = tl.load(state + tile, mask=inside, other=0.0)

    b, h = (walk // HEADS).to(tl.int64), walk % HEADS
    query = tl.load(q + b * q_batch + h // GROUP * q_head + rows, mask=in_k, other=0.0).to(tl.float32)
    key = tl.load(k + b * k_batch + h // GROUP * k_head + rows, mask=in_k, other=0.0).to(tl.float32)
    value = tl.load(v + b * v_batch + h * v_head + columns, mask=in_v, other=0.0).to(tl.float32)
    decay = tl.exp(tl.load(g + b * g_batch + h * g_head).to(tl.float32))
    write = tl.load(beta + b * beta_batch + h * beta_head).to(tl.float32)
    if NORMALIZE:
        query *= tl.rsqrt(tl.sum(query * query, 0) + L2_EPS)
        key *= tl.rsqrt(tl.sum(key * key, 0) + L2_EPS)

    recalled = tl.sum(before * key[:, None], 0)
    read = tl.sum(before * query[:, None], 0)
    u = write * (value - decay * recalled)
    out = scale * (decay * read + tl.sum(query * key, 0) * u)
    tl.store(after + tile, decay * before + key[:, None] * u[None, :], mask=inside)
    tl.store(o + walk.to(tl.int64) * V + columns, out.to(o.dtype.element_ty), mask=in_v)


@functools.cache
def blocks(key_dim: int, value_dim: int) -> dict[str, int]:
    """128 bytes of a row of the state, which is what memory likes to be asked for, and 64 numbers a thread."""
    block_k = triton.next_power_of_2(key_dim)
    block_v = min(triton.next_power_of_2(value_dim), 32)
    return {"BLOCK_K": block_k, "BLOCK_V": block_v, "num_warps": max(block_k * block_v // 2048, 1)}


def step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, scale: float, normalize_qk: bool
) -> tuple[Tensor, Tensor]:
    """o [B, HV, V] in q's dtype and the state after it; arguments as :func:`widthwise.kernels.gated_delta_rule_step`
    has checked them."""
    batch, heads, key_dim = q.shape
    value_heads, value_dim = v.shape[1:]
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    state = state.contiguous()
    o, after = v.new_empty(v.shape), torch.empty_like(state)
    if batch == 0:
        return o, after
    chosen = blocks(key_dim, value_dim)
    programs = batch * value_heads * -(-value_dim // chosen["BLOCK_V"])
    strides = [x.stride(axis) for x in (q, k, v, g, beta) for axis in (0, 1)]
    # Triton launches on the current device.
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        step_kernel[(programs,)](
            q, k, v, g, beta, state, o, after, scale, *strides,
            HEADS=value_heads, GROUP=value_heads // heads, K=key_dim, V=value_dim, NORMALIZE=normalize_qk, **chosen,
        )  # fmt: skip
    return o, after
