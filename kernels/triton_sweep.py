"""The sequential part: the state carried from chunk to chunk, forwards, and its gradient, backwards.

One program holds the columns [K, BLOCK_V] of one head's state in registers and walks along the sequence; columns of
the state never meet, so V is split freely. With u the solution of the chunk's system (see ``triton_prepare``), c the
WRITE row and S the state before the chunk:

    forwards     u = inverse (beta v - READ K S);   o = OUT Q S + P u;   S <- exp(G_last) S + K^T (WRITE u)
    backwards    du = P^T do + WRITE K dS;   dr = inverse^T du;
                 dS <- exp(G_last) dS + Q^T (OUT do) - K^T (READ dr)

The backward walk needs neither S nor u, so the two walks that the gradient is made of share one launch: half of the
programs recompute states and u, the other half carry dS. What they leave in memory per chunk (S, dS, u, dr) makes
every gradient computable from its chunk alone (``triton_gradients``).
"""

import triton
import triton.language as tl

from widthwise.kernels.triton_prepare import (
    CHUNK,
    ROW_G,
    ROW_OUT,
    ROW_READ,
    ROW_WRITE,
    ROWS,
    load_tile,
    locate_sequence,
)


@triton.jit
def load_state(state, n, head, columns, HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
               BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PRESENT: tl.constexpr):  # fmt: skip
    """Columns of ``state[n, head]`` as [BLOCK_K, BLOCK_V] fp32, or zeros."""
    if PRESENT:
        i = tl.arange(0, BLOCK_K)
        mask = (i < K)[:, None] & (columns < V)[None, :]
        at = (n.to(tl.int64) * HEADS + head) * K * V
        tile = tl.load(state + at + i[:, None] * V + columns[None, :], mask=mask, other=0.0)
    else:
        tile = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    return tile


@triton.jit
def store_state(state, at, columns, tile, K: tl.constexpr, V: tl.constexpr,
                BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr):  # fmt: skip
    """Columns of the [K, V] matrix number ``at`` of ``state``, cast to its type."""
    i = tl.arange(0, BLOCK_K)
    pointers = state + at * K * V + i[:, None] * V + columns[None, :]
    if K % BLOCK_K == 0 and V % BLOCK_V == 0:
        tl.store(pointers, tile.to(state.dtype.element_ty))
    else:
        tl.store(pointers, tile.to(state.dtype.element_ty), mask=(i < K)[:, None] & (columns < V)[None, :])


@triton.jit
def store_tile(base, stride, left, columns, tile, WIDTH: tl.constexpr):
    """The mirror of ``load_tile``."""
    i = tl.arange(0, CHUNK)
    mask = (i < left)[:, None] & (columns < WIDTH)[None, :]
    tl.store(base + i[:, None] * stride + columns[None, :], tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def walk_forwards(
    q, k, v, beta, rows, inverse, attention, initial, final, o, u, states,
    begin, length, first, n, head, columns,
    q_token: tl.constexpr, q_head: tl.constexpr, k_token: tl.constexpr, k_head: tl.constexpr,
    v_token: tl.constexpr, v_head: tl.constexpr, beta_token: tl.constexpr, beta_head: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, INITIAL: tl.constexpr, OUTPUT: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """With OUTPUT: o and the final state. Without: u and the state before every chunk, for the backward pass."""
    i = tl.arange(0, CHUNK)
    i_k = tl.arange(0, BLOCK_K)
    square = i[:, None] * CHUNK + i[None, :]
    state = load_state(initial, n, head, columns, HEADS, K, V, BLOCK_K, BLOCK_V, INITIAL)
    last = tl.load(rows + (first * HEADS + head) * ROWS * CHUNK + ROW_G * CHUNK + CHUNK - 1, mask=length > 0, other=0.0)
    for step in tl.range(tl.cdiv(length, CHUNK), num_stages=DEPTH):
        token, left = begin + step * CHUNK, length - step * CHUNK
        at = (first + step) * HEADS + head
        row = rows + at * ROWS * CHUNK + i
        k_tile = load_tile(k + token * k_token + (head // GROUP) * k_head, k_token, left, i_k, K, BLOCK_K)
        v_tile = load_tile(v + token * v_token + head * v_head, v_token, left, columns, V, BLOCK_V)
        beta_row = tl.load(beta + token * beta_token + head * beta_head + i * beta_token, mask=i < left, other=0.0)
        solve = tl.load(inverse + at * CHUNK * CHUNK + square)

        operand = state.to(k_tile.dtype)
        recalled = tl.dot(k_tile, operand)
        wanted = beta_row.to(tl.float32)[:, None] * v_tile - tl.load(row + ROW_READ * CHUNK)[:, None] * recalled
        u_tile = tl.dot(solve, wanted.to(k_tile.dtype))
        if OUTPUT:
            q_tile = load_tile(q + token * q_token + (head // GROUP) * q_head, q_token, left, i_k, K, BLOCK_K)
            mix = tl.load(attention + at * CHUNK * CHUNK + square)
            out = tl.dot(q_tile, operand) * tl.load(row + ROW_OUT * CHUNK)[:, None]
            out = tl.dot(mix, u_tile.to(k_tile.dtype), out)
            store_tile(o + (token * HEADS + head) * V, HEADS * V, left, columns, out, V)
        else:
            store_state(states, at, columns, operand, K, V, BLOCK_K, BLOCK_V)
            store_tile(u + (token * HEADS + head) * V, HEADS * V, left, columns, u_tile, V)
        written = (tl.load(row + ROW_WRITE * CHUNK)[:, None] * u_tile).to(k_tile.dtype)
        decay = tl.exp(last)
        state = tl.dot(tl.trans(k_tile), written, state * decay)
        # The next chunk's, by hand: the compiler's pipeline would give it shared memory, and there it is four bytes
        # short of room for a second program on the same multiprocessor.
        beyond = rows + (at + HEADS) * ROWS * CHUNK + ROW_G * CHUNK + CHUNK - 1
        last = tl.load(beyond, mask=left > CHUNK, other=0.0)
    if OUTPUT:
        store_state(final, n.to(tl.int64) * HEADS + head, columns, state, K, V, BLOCK_K, BLOCK_V)


@triton.jit
def walk_backwards(
    q, k, do, rows, inverse, attention, dfinal, dinitial, dr, dstates,
    begin, length, first, n, head, columns,
    q_token: tl.constexpr, q_head: tl.constexpr, k_token: tl.constexpr, k_head: tl.constexpr,
    do_token: tl.constexpr, do_head: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, INITIAL: tl.constexpr, FINAL: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """dr and the gradient of the state after every chunk."""
    i = tl.arange(0, CHUNK)
    i_k = tl.arange(0, BLOCK_K)
    square = i[:, None] * CHUNK + i[None, :]
    dstate = load_state(dfinal, n, head, columns, HEADS, K, V, BLOCK_K, BLOCK_V, FINAL)
    chunks = tl.cdiv(length, CHUNK)
    ends = rows + (first * HEADS + head) * ROWS * CHUNK + ROW_G * CHUNK + CHUNK - 1
    last = tl.load(ends + (chunks - 1) * HEADS * ROWS * CHUNK, mask=length > 0, other=0.0)
    for back in tl.range(chunks, num_stages=DEPTH):
        step = chunks - 1 - back
        token, left = begin + step * CHUNK, length - step * CHUNK
        at = (first + step) * HEADS + head
        row = rows + at * ROWS * CHUNK + i
        k_tile = load_tile(k + token * k_token + (head // GROUP) * k_head, k_token, left, i_k, K, BLOCK_K)
        do_tile = load_tile(do + token * do_token + head * do_head, do_token, left, columns, V, BLOCK_V)
        solve = tl.load(inverse + at * CHUNK * CHUNK + square)
        mix = tl.load(attention + at * CHUNK * CHUNK + square)

        operand = dstate.to(k_tile.dtype)
        store_state(dstates, at, columns, operand, K, V, BLOCK_K, BLOCK_V)
        du = tl.dot(k_tile, operand) * tl.load(row + ROW_WRITE * CHUNK)[:, None]
        du = tl.dot(tl.trans(mix), do_tile, du)
        dr_tile = tl.dot(tl.trans(solve), du.to(k_tile.dtype))
        store_tile(dr + (token * HEADS + head) * V, HEADS * V, left, columns, dr_tile, V)
        q_tile = load_tile(q + token * q_token + (head // GROUP) * q_head, q_token, left, i_k, K, BLOCK_K)
        shown = (tl.load(row + ROW_OUT * CHUNK)[:, None] * do_tile).to(k_tile.dtype)
        read = (-tl.load(row + ROW_READ * CHUNK)[:, None] * dr_tile).to(k_tile.dtype)
        decay = tl.exp(last)
        dstate = tl.dot(tl.trans(k_tile), read, dstate * decay)
        dstate = tl.dot(tl.trans(q_tile), shown, dstate)
        last = tl.load(ends + (step - 1) * HEADS * ROWS * CHUNK, mask=step > 0, other=0.0)
    if INITIAL:
        store_state(dinitial, n.to(tl.int64) * HEADS + head, columns, dstate, K, V, BLOCK_K, BLOCK_V)


@triton.jit(do_not_specialize=["T"])
def forward_kernel(
    q, k, v, beta, rows, inverse, attention, initial, final, o, cu_seqlens, chunk_offsets, T,
    q_token: tl.constexpr, q_head: tl.constexpr, k_token: tl.constexpr, k_head: tl.constexpr,
    v_token: tl.constexpr, v_head: tl.constexpr, beta_token: tl.constexpr, beta_head: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, VARLEN: tl.constexpr, INITIAL: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """o [B, T, HV, V] and final [N, HV, K, V]; one program a sequence, value head and block of V."""
    V_BLOCKS: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    program = tl.program_id(0)
    columns = (program % V_BLOCKS) * BLOCK_V + tl.arange(0, BLOCK_V)
    head, n = (program // V_BLOCKS) % HEADS, program // (V_BLOCKS * HEADS)
    begin, length, first = locate_sequence(n, T, cu_seqlens, chunk_offsets, VARLEN)
    walk_forwards(
        q, k, v, beta, rows, inverse, attention, initial, final, o, o, o, begin, length, first, n, head, columns,
        q_token, q_head, k_token, k_head, v_token, v_head, beta_token, beta_head,
        HEADS, GROUP, K, V, BLOCK_K, BLOCK_V, INITIAL, True, DEPTH,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def backward_kernel(
    q, k, v, beta, do, rows, inverse, attention, initial, dfinal, dinitial, u, dr, states, dstates,
    cu_seqlens, chunk_offsets, T,
    q_token: tl.constexpr, q_head: tl.constexpr, k_token: tl.constexpr, k_head: tl.constexpr,
    v_token: tl.constexpr, v_head: tl.constexpr, beta_token: tl.constexpr, beta_head: tl.constexpr,
    do_token: tl.constexpr, do_head: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, VARLEN: tl.constexpr, INITIAL: tl.constexpr, FINAL: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """u and dr [B, T, HV, V], states and dstates [chunks, HV, K, V]; two programs a sequence, head and block of V."""
    V_BLOCKS: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    program = tl.program_id(0) // 2
    columns = (program % V_BLOCKS) * BLOCK_V + tl.arange(0, BLOCK_V)
    head, n = (program // V_BLOCKS) % HEADS, program // (V_BLOCKS * HEADS)
    begin, length, first = locate_sequence(n, T, cu_seqlens, chunk_offsets, VARLEN)
    if tl.program_id(0) % 2 == 0:
        walk_backwards(
            q, k, do, rows, inverse, attention, dfinal, dinitial, dr, dstates, begin, length, first, n, head, columns,
            q_token, q_head, k_token, k_head, do_token, do_head,
            HEADS, GROUP, K, V, BLOCK_K, BLOCK_V, INITIAL, FINAL, DEPTH,
        )  # fmt: skip
    else:
        walk_forwards(
            q, k, v, beta, rows, inverse, attention, initial, initial, u, u, states,
            begin, length, first, n, head, columns,
            q_token, q_head, k_token, k_head, v_token, v_head, beta_token, beta_head,
            HEADS, GROUP, K, V, BLOCK_K, BLOCK_V, INITIAL, False, DEPTH,
        )  # fmt: skip
