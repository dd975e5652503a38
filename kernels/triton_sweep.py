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
def fetch(x, n, step, head, column, token, left, x_token, x_head,
          WIDTH: tl.constexpr, BLOCK: tl.constexpr, DESCRIBED: tl.constexpr):  # fmt: skip
    """The tile [C, BLOCK] of x at a chunk, a head and a column, zero past the sequence and past WIDTH.

    With DESCRIBED, x is a descriptor of [B, heads, T, WIDTH] and one thread has the copy engine bring the tile;
    otherwise a pointer, and every thread computes addresses, at the expense of the walk's chain.
    """
    if DESCRIBED:
        tile = tl.reshape(x.load([n, head, step * CHUNK, column]), [CHUNK, BLOCK])
    else:
        tile = load_tile(x + token * x_token + head * x_head, x_token, left, column + tl.arange(0, BLOCK), WIDTH, BLOCK)
    return tile


@triton.jit
def fetch_square(x, at, DESCRIBED: tl.constexpr):
    """The [C, C] matrix number ``at`` of x."""
    i = tl.arange(0, CHUNK)
    if DESCRIBED:
        tile = tl.reshape(x.load([at.to(tl.int32), 0, 0]), [CHUNK, CHUNK])
    else:
        tile = tl.load(x + at * CHUNK * CHUNK + i[:, None] * CHUNK + i[None, :])
    return tile


@triton.jit
def walk_forwards(
    q, k, v, beta, rows, inverse, attention, initial, final, o, u, states,
    begin, length, first, n, head, column,
    q_token: tl.constexpr, q_head: tl.constexpr, k_token: tl.constexpr, k_head: tl.constexpr,
    v_token: tl.constexpr, v_head: tl.constexpr, beta_token: tl.constexpr, beta_head: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, INITIAL: tl.constexpr, OUTPUT: tl.constexpr,
    DEPTH: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """With OUTPUT: o and the final state. Without: u and the state before every chunk, for the backward pass."""
    # A row's numbers come a chunk ahead and by hand where that is faster: not beside the five tiles of the output.
    AHEAD: tl.constexpr = not OUTPUT or DEPTH == 1
    i = tl.arange(0, CHUNK)
    columns = column + tl.arange(0, BLOCK_V)
    state = load_state(initial, n, head, columns, HEADS, K, V, BLOCK_K, BLOCK_V, INITIAL)
    ends = rows + ROW_G * CHUNK + CHUNK - 1
    last = tl.load(ends + (first * HEADS + head) * ROWS * CHUNK, mask=length > 0, other=0.0)
    if AHEAD:
        row = rows + (first * HEADS + head) * ROWS * CHUNK
        betas = beta + begin * beta_token + head * beta_head + i * beta_token
        beta_row = tl.load(betas, mask=i < length, other=0.0).to(tl.float32)
        read_row = tl.load(row + ROW_READ * CHUNK + i, mask=i < length, other=0.0)
        write_row = tl.load(row + ROW_WRITE * CHUNK + i, mask=i < length, other=0.0)
        out_row = tl.load(row + ROW_OUT * CHUNK + i, mask=i < length, other=0.0)
    for step in tl.range(tl.cdiv(length, CHUNK), num_stages=DEPTH):
        token, left = begin + step * CHUNK, length - step * CHUNK
        at = (first + step) * HEADS + head
        k_tile = fetch(k, n, step, head // GROUP, 0, token, left, k_token, k_head, K, BLOCK_K, DESCRIBED)
        if AHEAD:
            solve = fetch_square(inverse, at, DESCRIBED)
            v_tile = fetch(v, n, step, head, column, token, left, v_token, v_head, V, BLOCK_V, DESCRIBED)
        else:
            v_tile = fetch(v, n, step, head, column, token, left, v_token, v_head, V, BLOCK_V, DESCRIBED)
            here = rows + at * ROWS * CHUNK + i
            betas = beta + token * beta_token + head * beta_head + i * beta_token
            beta_row = tl.load(betas, mask=i < left, other=0.0).to(tl.float32)
            solve = fetch_square(inverse, at, DESCRIBED)

        operand = state.to(k_tile.dtype)
        recalled = tl.dot(k_tile, operand)
        if not AHEAD:
            read_row = tl.load(here + ROW_READ * CHUNK)
        wanted = beta_row[:, None] * v_tile - read_row[:, None] * recalled
        u_tile = tl.dot(solve, wanted.to(k_tile.dtype))
        if OUTPUT:
            q_tile = fetch(q, n, step, head // GROUP, 0, token, left, q_token, q_head, K, BLOCK_K, DESCRIBED)
            mix = fetch_square(attention, at, DESCRIBED)
            if not AHEAD:
                out_row = tl.load(here + ROW_OUT * CHUNK)
            out = tl.dot(q_tile, operand) * out_row[:, None]
            out = tl.dot(mix, u_tile.to(k_tile.dtype), out)
            store_tile(o + (token * HEADS + head) * V, HEADS * V, left, columns, out, V)
        else:
            store_state(states, at, columns, operand, K, V, BLOCK_K, BLOCK_V)
            store_tile(u + (token * HEADS + head) * V, HEADS * V, left, columns, u_tile, V)
        if not AHEAD:
            write_row = tl.load(here + ROW_WRITE * CHUNK)
        written = (write_row[:, None] * u_tile).to(k_tile.dtype)
        decay = tl.exp(last)
        state = tl.dot(tl.trans(k_tile), written, state * decay)
        # The next chunk's last, always by hand: it would take four bytes of shared memory too many.
        last = tl.load(ends + (at + HEADS) * ROWS * CHUNK, mask=left > CHUNK, other=0.0)
        if AHEAD:
            row += HEADS * ROWS * CHUNK
            betas += CHUNK * beta_token
            beta_row = tl.load(betas, mask=i < left - CHUNK, other=0.0).to(tl.float32)
            read_row = tl.load(row + ROW_READ * CHUNK + i, mask=i < left - CHUNK, other=0.0)
            write_row = tl.load(row + ROW_WRITE * CHUNK + i, mask=i < left - CHUNK, other=0.0)
            out_row = tl.load(row + ROW_OUT * CHUNK + i, mask=i < left - CHUNK, other=0.0)
    if OUTPUT:
        store_state(final, n.to(tl.int64) * HEADS + head, columns, state, K, V, BLOCK_K, BLOCK_V)


@triton.jit
def walk_backwards(
    q, k, do, rows, inverse, attention, dfinal, dinitial, dr, dstates,
    begin, length, first, n, head, column,
    q_token: tl.constexpr, q_head: tl.constexpr, k_token: tl.constexpr, k_head: tl.constexpr,
    do_token: tl.constexpr, do_head: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, INITIAL: tl.constexpr, FINAL: tl.constexpr,
    DEPTH: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """dr and the gradient of the state after every chunk."""
    i = tl.arange(0, CHUNK)
    columns = column + tl.arange(0, BLOCK_V)
    dstate = load_state(dfinal, n, head, columns, HEADS, K, V, BLOCK_K, BLOCK_V, FINAL)
    chunks = tl.cdiv(length, CHUNK)
    row = rows + ((first + chunks - 1) * HEADS + head) * ROWS * CHUNK
    last = tl.load(row + ROW_G * CHUNK + CHUNK - 1, mask=length > 0, other=0.0)
    read_row = tl.load(row + ROW_READ * CHUNK + i, mask=i < length, other=0.0)
    write_row = tl.load(row + ROW_WRITE * CHUNK + i, mask=i < length, other=0.0)
    out_row = tl.load(row + ROW_OUT * CHUNK + i, mask=i < length, other=0.0)
    for back in tl.range(chunks, num_stages=DEPTH):
        step = chunks - 1 - back
        token, left = begin + step * CHUNK, length - step * CHUNK
        at = (first + step) * HEADS + head
        k_tile = fetch(k, n, step, head // GROUP, 0, token, left, k_token, k_head, K, BLOCK_K, DESCRIBED)
        solve = fetch_square(inverse, at, DESCRIBED)
        mix = fetch_square(attention, at, DESCRIBED)
        if DESCRIBED:
            q_tile = fetch(q, n, step, head // GROUP, 0, token, left, q_token, q_head, K, BLOCK_K, DESCRIBED)
        do_tile = fetch(do, n, step, head, column, token, left, do_token, do_head, V, BLOCK_V, DESCRIBED)

        operand = dstate.to(k_tile.dtype)
        store_state(dstates, at, columns, operand, K, V, BLOCK_K, BLOCK_V)
        du = tl.dot(k_tile, operand) * write_row[:, None]
        du = tl.dot(tl.trans(mix), do_tile, du)
        dr_tile = tl.dot(tl.trans(solve), du.to(k_tile.dtype))
        store_tile(dr + (token * HEADS + head) * V, HEADS * V, left, columns, dr_tile, V)
        if not DESCRIBED:
            q_tile = fetch(q, n, step, head // GROUP, 0, token, left, q_token, q_head, K, BLOCK_K, DESCRIBED)
        shown = (out_row[:, None] * do_tile).to(k_tile.dtype)
        read = (-read_row[:, None] * dr_tile).to(k_tile.dtype)
        decay = tl.exp(last)
        dstate = tl.dot(tl.trans(k_tile), read, dstate * decay)
        dstate = tl.dot(tl.trans(q_tile), shown, dstate)
        row -= HEADS * ROWS * CHUNK
        last = tl.load(row + ROW_G * CHUNK + CHUNK - 1, mask=step > 0, other=0.0)
        read_row = tl.load(row + ROW_READ * CHUNK + i, mask=i < step * CHUNK, other=0.0)
        write_row = tl.load(row + ROW_WRITE * CHUNK + i, mask=i < step * CHUNK, other=0.0)
        out_row = tl.load(row + ROW_OUT * CHUNK + i, mask=i < step * CHUNK, other=0.0)
    if INITIAL:
        store_state(dinitial, n.to(tl.int64) * HEADS + head, columns, dstate, K, V, BLOCK_K, BLOCK_V)


@triton.jit(do_not_specialize=["T"])
def forward_kernel(
    q, k, v, beta, rows, inverse, attention, initial, final, o, cu_seqlens, chunk_offsets, T,
    q_token: tl.constexpr, q_head: tl.constexpr, k_token: tl.constexpr, k_head: tl.constexpr,
    v_token: tl.constexpr, v_head: tl.constexpr, beta_token: tl.constexpr, beta_head: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, VARLEN: tl.constexpr, INITIAL: tl.constexpr, DEPTH: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    """o [B, T, HV, V] and final [N, HV, K, V]; one program a sequence, value head and block of V."""
    V_BLOCKS: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    program = tl.program_id(0)
    column = (program % V_BLOCKS) * BLOCK_V
    head, n = (program // V_BLOCKS) % HEADS, program // (V_BLOCKS * HEADS)
    begin, length, first = locate_sequence(n, T, cu_seqlens, chunk_offsets, VARLEN)
    walk_forwards(
        q, k, v, beta, rows, inverse, attention, initial, final, o, o, o, begin, length, first, n, head, column,
        q_token, q_head, k_token, k_head, v_token, v_head, beta_token, beta_head,
        HEADS, GROUP, K, V, BLOCK_K, BLOCK_V, INITIAL, True, DEPTH, DESCRIBED,
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
    DEPTH: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """u and dr [B, T, HV, V], states and dstates [chunks, HV, K, V]; two programs a sequence, head and block of V."""
    V_BLOCKS: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    program = tl.program_id(0) // 2
    column = (program % V_BLOCKS) * BLOCK_V
    head, n = (program // V_BLOCKS) % HEADS, program // (V_BLOCKS * HEADS)
    begin, length, first = locate_sequence(n, T, cu_seqlens, chunk_offsets, VARLEN)
    if tl.program_id(0) % 2 == 0:
        walk_backwards(
            q, k, do, rows, inverse, attention, dfinal, dinitial, dr, dstates, begin, length, first, n, head, column,
            q_token, q_head, k_token, k_head, do_token, do_head,
            HEADS, GROUP, K, V, BLOCK_K, BLOCK_V, INITIAL, FINAL, DEPTH, DESCRIBED,
        )  # fmt: skip
    else:
        walk_forwards(
            q, k, v, beta, rows, inverse, attention, initial, initial, u, u, states,
            begin, length, first, n, head, column,
            q_token, q_head, k_token, k_head, v_token, v_head, beta_token, beta_head,
            HEADS, GROUP, K, V, BLOCK_K, BLOCK_V, INITIAL, False, DEPTH, DESCRIBED,
        )  # fmt: skip
