"""The gradients of a chunk where V takes several blocks: as ``triton_gradients``, but for the order.

The states at both ends of the chunk, most of what is read, are read once: for a block of V the sums of all blocks of K
grow side by side in registers. F and E come of the same pass, or, where registers do not suffice for those as well, of
a pass of their own before.
"""

import triton
import triton.language as tl

from widthwise.kernels.triton_gradients import attention_in_fp32, from_pairs, less_product, load_matrix
from widthwise.kernels.triton_prepare import (
    CHUNK,
    ROW_BETA,
    ROW_G,
    ROW_K,
    ROW_Q,
    ROW_WRITE,
    ROWS,
    load_tile,
    locate_chunk,
)
from widthwise.kernels.triton_tiles import fetch, put, store_tile


@triton.jit
def zeros(COUNT: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    out = ()
    for _ in tl.static_range(COUNT):
        out += (tl.zeros([HEIGHT, WIDTH], tl.float32),)  # type: ignore[assignment]
    return out


@triton.jit
def load_matrices(x, at, column, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
                  DESCRIBED: tl.constexpr):  # fmt: skip
    """BLOCK_V columns of the [K, V] matrix number ``at`` of x, for every block of K."""
    out = ()
    for block in tl.static_range((K + BLOCK_K - 1) // BLOCK_K):
        if DESCRIBED:
            tile = tl.reshape(x.load([at.to(tl.int32), block * BLOCK_K, column]), [BLOCK_K, BLOCK_V])
        else:
            i_k, columns = block * BLOCK_K + tl.arange(0, BLOCK_K), column + tl.arange(0, BLOCK_V)
            tile = load_matrix(x + at * K * V, i_k, columns, K, V, BLOCK_K, BLOCK_V)
        out += (tile,)  # type: ignore[assignment]
    return out


@triton.jit
def load_blocks(x, stride, left, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """All blocks of the rows at x."""
    out = ()
    for block in tl.static_range((WIDTH + BLOCK - 1) // BLOCK):
        out += (load_tile(x, stride, left, block * BLOCK + tl.arange(0, BLOCK), WIDTH, BLOCK),)  # type: ignore[assignment]
    return out


@triton.jit
def plus_products(totals, x, tiles):
    """totals + x tile^T, for every block."""
    out = ()
    for block in tl.static_range(len(tiles)):
        out += (tl.dot(x, tl.trans(tiles[block]), totals[block]),)  # type: ignore[assignment]
    return out


@triton.jit
def plus_squares(totals, states, dstates):
    """totals + S^T dS, of which the trace is wanted, for every block by itself: of a chain of dots Triton would lay
    eight warps along the 64 rows."""
    out = ()
    for block in tl.static_range(len(states)):
        out += (tl.dot(tl.trans(states[block]), dstates[block], totals[block]),)  # type: ignore[assignment]
    return out


@triton.jit
def trace(tiles, SIZE: tl.constexpr):
    total = tiles[0]
    for block in tl.static_range(1, len(tiles)):
        total += tiles[block]
    i = tl.arange(0, SIZE)
    return tl.sum(tl.where(i[:, None] == i[None, :], total, 0.0))


@triton.jit
def over_values(
    do, dr, u, states, dstates, n, step, head, token, left, at, do_token: tl.constexpr, do_head: tl.constexpr,
    HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    PAIRS: tl.constexpr, STATES: tl.constexpr, DEPTH: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """The sums over V: with PAIRS, do u^T and dr u^T; with STATES, for every block of K do S^T, dr S^T and u dS^T, and
    the trace of S dS^T."""
    K_BLOCKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    f = tl.zeros([CHUNK, CHUNK], tl.float32)
    e = tl.zeros([CHUNK, CHUNK], tl.float32)
    do_s = zeros(K_BLOCKS, CHUNK, BLOCK_K)
    dr_s = zeros(K_BLOCKS, CHUNK, BLOCK_K)
    u_ds = zeros(K_BLOCKS, CHUNK, BLOCK_K)
    s_ds = zeros(K_BLOCKS, BLOCK_V, BLOCK_V)
    for block in tl.range((V + BLOCK_V - 1) // BLOCK_V, num_stages=DEPTH):
        column = block * BLOCK_V
        do_tile = fetch(do, n, step, head, column, token, left, do_token, do_head, V, BLOCK_V, DESCRIBED)
        dr_tile = fetch(dr, n, step, head, column, token, left, HEADS * V, V, V, BLOCK_V, DESCRIBED)
        u_tile = fetch(u, n, step, head, column, token, left, HEADS * V, V, V, BLOCK_V, DESCRIBED)
        if STATES:
            state = load_matrices(states, at, column, K, V, BLOCK_K, BLOCK_V, DESCRIBED)
            dstate = load_matrices(dstates, at, column, K, V, BLOCK_K, BLOCK_V, DESCRIBED)
        if PAIRS:
            f = tl.dot(do_tile, tl.trans(u_tile), f)
            e = tl.dot(dr_tile, tl.trans(u_tile), e)
        if STATES:
            do_s = plus_products(do_s, do_tile, state)
            dr_s = plus_products(dr_s, dr_tile, state)
            u_ds = plus_products(u_ds, u_tile, dstate)
            s_ds = plus_squares(s_ds, state, dstate)
    return f, e, do_s, dr_s, u_ds, trace(s_ds, BLOCK_V)


@triton.jit(do_not_specialize=["T", "scale"])
def wide_gradients_kernel(
    q, k, do, u, v, dr, states, dstates, rows, attention, f_pairs, e_pairs, dq, dk, dg, dbeta,
    cu_seqlens, chunk_offsets, chunk_sequence, T, scale,
    q_token: tl.constexpr, q_head: tl.constexpr, k_token: tl.constexpr, k_head: tl.constexpr,
    v_token: tl.constexpr, v_head: tl.constexpr,
    do_token: tl.constexpr, do_head: tl.constexpr, PAIRS_WIDTH: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, VARLEN: tl.constexpr, NORMALIZE: tl.constexpr, FINISH: tl.constexpr,
    ONE_PASS: tl.constexpr, PAIRS_DEPTH: tl.constexpr, DEPTH: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """As ``gradients_kernel``; dr is the memory of dv."""
    K_BLOCKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    program = tl.program_id(0)
    head, chunk = program % HEADS, (program // HEADS).to(tl.int64)
    n, step, token, left = locate_chunk(chunk, T, cu_seqlens, chunk_offsets, chunk_sequence, VARLEN)
    if left <= 0:
        return
    at = chunk * HEADS + head
    q += token * q_token + (head // GROUP) * q_head
    k += token * k_token + (head // GROUP) * k_head
    dq += (token * HEADS + head) * K
    dk += (token * HEADS + head) * K
    f_pairs += (token * HEADS + head) * PAIRS_WIDTH
    e_pairs += (token * HEADS + head) * PAIRS_WIDTH
    i = tl.arange(0, CHUNK)
    rows += at * ROWS * CHUNK + i

    k_tiles = load_blocks(k, k_token, left, K, BLOCK_K)
    HALF: tl.constexpr = q.dtype.element_ty == tl.float16
    if not HALF:
        mix = tl.load(attention + at * CHUNK * CHUNK + i[:, None] * CHUNK + i[None, :])
    gates = tl.load(rows + ROW_G * CHUNK)
    k_unit = tl.load(rows + ROW_K * CHUNK)
    q_unit = tl.load(rows + ROW_Q * CHUNK)
    beta_row = tl.load(rows + ROW_BETA * CHUNK)
    f, e, dq_tiles, dk_tiles, y_tiles, dlast = over_values(
        do, dr, u, states, dstates, n, step, head, token, left, at, do_token, do_head,
        HEADS, K, V, BLOCK_K, BLOCK_V, True, ONE_PASS, DEPTH if ONE_PASS else PAIRS_DEPTH, DESCRIBED,
    )  # fmt: skip
    keys = tl.dot(k_tiles[0], tl.trans(k_tiles[0]))
    for block in tl.static_range(1, K_BLOCKS):
        keys += tl.dot(k_tiles[block], tl.trans(k_tiles[block]))
    if HALF:
        mix = attention_in_fp32(q, k, q_token, k_token, left, gates, q_unit, k_unit, scale, K, BLOCK_K)
    q_dq, k_dk, dgates, dbeta_row = from_pairs(
        f, e, keys, mix, gates, q_unit, k_unit, beta_row, scale, f_pairs, e_pairs, HEADS * PAIRS_WIDTH, left
    )
    if not ONE_PASS:
        _, _, dq_tiles, dk_tiles, y_tiles, dlast = over_values(
            do, dr, u, states, dstates, n, step, head, token, left, at, do_token, do_head,
            HEADS, K, V, BLOCK_K, BLOCK_V, False, True, DEPTH, DESCRIBED,
        )  # fmt: skip

    # The barriers keep loads from being moved up to where registers are scarce: a block of K is finished but for the
    # part along the row, and its y is gone, before the next one's q and k come.
    tl.debug_barrier()
    f_tile = load_tile(f_pairs, HEADS * PAIRS_WIDTH, left, i, CHUNK, CHUNK)
    e_tile = load_tile(e_pairs, HEADS * PAIRS_WIDTH, left, i, CHUNK, CHUNK)
    reads = tl.exp(gates)
    writes = tl.load(rows + ROW_WRITE * CHUNK)
    q_share = tl.zeros([CHUNK], tl.float32)
    k_share = tl.zeros([CHUNK], tl.float32)
    wrote = tl.zeros([CHUNK], tl.float32)
    dq_done, dk_done = (), ()
    for block in tl.static_range(K_BLOCKS):
        i_k = block * BLOCK_K + tl.arange(0, BLOCK_K)
        q_tile = load_tile(q, q_token, left, i_k, K, BLOCK_K)
        k_tile = load_tile(k, k_token, left, i_k, K, BLOCK_K)
        dq_tile = dq_tiles[block] * (reads * q_unit * scale)[:, None]
        dk_tile = dk_tiles[block] * (-reads * k_unit)[:, None]
        y_tile = y_tiles[block] * writes[:, None]
        q_share += tl.sum(q_tile * dq_tile, 1)
        k_share += tl.sum(k_tile * dk_tile, 1)
        wrote += tl.sum(k_tile * y_tile, 1)
        dq_done += (less_product(dq_tile, f_tile, k_tile),)  # type: ignore[assignment]
        dk_tile = dk_tile * beta_row[:, None] + y_tile
        dk_tile = less_product(dk_tile, e_tile, k_tile)
        dk_tile = less_product(dk_tile, tl.trans(e_tile), k_tile)
        dk_done += (less_product(dk_tile, tl.trans(f_tile), q_tile),)  # type: ignore[assignment]
    q_dq += q_share
    dbeta_row += k_share
    k_share *= beta_row
    k_dk += k_share + wrote
    dgates += q_share + k_share
    tl.debug_barrier()
    for block in tl.static_range(K_BLOCKS):
        i_k = block * BLOCK_K + tl.arange(0, BLOCK_K)
        dq_tile, dk_tile = dq_done[block], dk_done[block]
        if FINISH and NORMALIZE:
            q_tile = load_tile(q, q_token, left, i_k, K, BLOCK_K)
            k_tile = load_tile(k, k_token, left, i_k, K, BLOCK_K)
            dq_tile -= q_tile * (q_dq * q_unit * q_unit)[:, None]
            dk_tile -= k_tile * (k_dk * k_unit * k_unit)[:, None]
        store_tile(dq, HEADS * K, left, i_k, dq_tile, K)
        store_tile(dk, HEADS * K, left, i_k, dk_tile, K)

    total = tl.zeros([CHUNK, BLOCK_V], tl.float32)
    for block in tl.range((V + BLOCK_V - 1) // BLOCK_V, num_stages=PAIRS_DEPTH):
        column = block * BLOCK_V
        v_tile = fetch(v, n, step, head, column, token, left, v_token, v_head, V, BLOCK_V, DESCRIBED)
        dr_tile = fetch(dr, n, step, head, column, token, left, HEADS * V, V, V, BLOCK_V, DESCRIBED).to(tl.float32)
        total += dr_tile * v_tile
        dv_tile = (dr_tile * beta_row[:, None]).to(v_tile.dtype)
        put(dr, n, step, head, column, token, left, tl.trans(dv_tile), HEADS, V, BLOCK_V, DESCRIBED)
    dbeta_row += tl.sum(total, 1)

    places = token * HEADS + head + i * HEADS
    tl.store(dbeta + places, dbeta_row.to(dbeta.dtype.element_ty), mask=i < left)
    # Added up without differences, as in ``gradients_kernel``.
    below = i[:, None] > i[None, :]
    dlast *= tl.exp(tl.load(rows - i + ROW_G * CHUNK + CHUNK - 1))
    dg_row = tl.cumsum(dgates, 0, reverse=True) + tl.sum(tl.where(below, wrote[None, :], 0.0), 1) + dlast
    tl.store(dg + places, dg_row.to(dg.dtype.element_ty), mask=i < left)
