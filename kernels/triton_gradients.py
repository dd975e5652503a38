"""The gradients of a chunk, from the states at its two ends alone: every chunk at once.

With S the state before the chunk, dS the gradient of the state after it, u, dr from ``triton_sweep``, and exponents
of gate differences written exp(i - j), the chunk's share of each gradient is (q, k normalized, mask i >= j or i > j)

    F[i, j] = scale exp(i - j) do_i . u_j          E[i, j] = -exp(i - j) dr_i . u_j
    dq = scale exp(G) do S^T + F k                  Z = -exp(G) dr S^T + E k
    dk = beta Z + Y,   Y = exp(G_last - G) u dS^T + F^T q + (beta E)^T k
    dv = beta dr       dbeta = dr . v + k . Z       dG = q . dq + beta k . Z - k . Y

The last holds because q_i only ever appears as exp(G_i) q_i, k_i as exp(G_i) k_i where it reads and as exp(-G_i) k_i
where it writes. dg is the sum of dG from its token on, plus the gradient of G_last.
"""

import triton
import triton.language as tl

from widthwise.kernels.triton_prepare import (
    CHUNK,
    L2_EPS,
    ROW_G,
    ROW_K,
    ROW_Q,
    ROWS,
    load_tile,
    locate_chunk,
)
from widthwise.kernels.triton_sweep import store_tile


@triton.jit
def load_matrix(base, rows, columns, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr):
    """Tile [BLOCK_K, BLOCK_V] of a [K, V] matrix, zero outside it."""
    pointers = base + rows[:, None] * V + columns[None, :]
    if K % BLOCK_K == 0 and V % BLOCK_V == 0:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=(rows < K)[:, None] & (columns < V)[None, :], other=0.0)
    return tile


@triton.jit(do_not_specialize=["T", "scale"])
def gradients_kernel(
    q, k, v, beta, do, u, dv, states, dstates, rows, attention, pairs, dq, dk, dg, dbeta,
    cu_seqlens, chunk_offsets, chunk_sequence, T, scale,
    q_token: tl.constexpr, q_head: tl.constexpr, k_token: tl.constexpr, k_head: tl.constexpr,
    v_token: tl.constexpr, v_head: tl.constexpr, beta_token: tl.constexpr, beta_head: tl.constexpr,
    do_token: tl.constexpr, do_head: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    VARLEN: tl.constexpr, NORMALIZE: tl.constexpr, FINISH: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One program a chunk and value head: dv (which holds dr on entry), dg, dbeta [B, T, HV(, V)], dq and dk.

    With FINISH, dq and dk are final; without, they are those of the normalized q and k, a value head each
    [B, T, HV, K], and ``finish_kernel`` does the rest.
    """
    K_BLOCKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    V_BLOCKS: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    program = tl.program_id(0)
    head, chunk = program % HEADS, (program // HEADS).to(tl.int64)
    token, left = locate_chunk(chunk, T, cu_seqlens, chunk_offsets, chunk_sequence, VARLEN)
    if left <= 0:
        return
    operand = k.dtype.element_ty
    q += token * q_token + (head // GROUP) * q_head
    k += token * k_token + (head // GROUP) * k_head
    v += token * v_token + head * v_head
    do += token * do_token + head * do_head
    u += (token * HEADS + head) * V
    dv += (token * HEADS + head) * V
    dq += (token * HEADS + head) * K
    dk += (token * HEADS + head) * K
    states += (chunk * HEADS + head) * K * V
    dstates += (chunk * HEADS + head) * K * V

    i = tl.arange(0, CHUNK)
    rows += (chunk * HEADS + head) * ROWS * CHUNK + i
    gates = tl.load(rows + ROW_G * CHUNK)
    q_unit = tl.load(rows + ROW_Q * CHUNK)
    k_unit = tl.load(rows + ROW_K * CHUNK)
    last = tl.sum(tl.where(i == CHUNK - 1, gates, 0.0))
    beta_row = tl.load(beta + (token * beta_token + head * beta_head) + i * beta_token, mask=i < left, other=0.0)
    beta_row = beta_row.to(tl.float32)

    below = i[:, None] > i[None, :]
    same = i[:, None] == i[None, :]

    # Three passes, so that none holds more than the registers do: F and E; what reads the state (dq, Z); what writes
    # it (Y). F and E go through memory. That makes their transposes transposed loads, and it must: Triton up to 3.7.0
    # miscompiles a dot whose first argument is the transpose of a cast accumulator on Hopper (fla #640).
    # In the pipelined loops what is loaded goes to dots alone: where a tile in a pipelined loop is also wanted in
    # registers, Triton 3.6 gives it one buffer too few, and the next copy overtakes a dot still reading.
    # Tiles for after a loop are loaded before it: their latency hides behind the loop's.
    square = i[:, None] * CHUNK + i[None, :]
    f_base = pairs + (chunk * HEADS + head) * 2 * CHUNK * CHUNK + square
    e_base = f_base + CHUNK * CHUNK
    mix = tl.load(attention + (chunk * HEADS + head) * CHUNK * CHUNK + square)
    keys = tl.zeros([CHUNK, CHUNK], tl.float32)
    for k_block in tl.static_range(K_BLOCKS):
        k_tile = load_tile(k, k_token, left, k_block * BLOCK_K + tl.arange(0, BLOCK_K), K, BLOCK_K)
        keys = tl.dot(k_tile, tl.trans(k_tile), keys)
    f = tl.zeros([CHUNK, CHUNK], tl.float32)
    e = tl.zeros([CHUNK, CHUNK], tl.float32)
    for block in tl.range(V_BLOCKS, num_stages=DEPTH):
        columns = block * BLOCK_V + tl.arange(0, BLOCK_V)
        do_tile = load_tile(do, do_token, left, columns, V, BLOCK_V)
        dr_tile = load_tile(dv, HEADS * V, left, columns, V, BLOCK_V)
        u_tile = load_tile(u, HEADS * V, left, columns, V, BLOCK_V)
        f = tl.dot(do_tile, tl.trans(u_tile), f)
        e = tl.dot(dr_tile, tl.trans(u_tile), e)
    # What a pair i > j adds to dG at i it takes at j, to the last bit: from q . dq - k . Y the rounding would stay.
    share = f * mix
    k_dk = tl.sum(tl.where(same, share, 0.0), 1)
    share = tl.where(below, share, 0.0)
    dgates = tl.sum(share, 1)
    q_dq = dgates + k_dk
    decay = tl.exp(tl.where(below | same, gates[:, None] - gates[None, :], float("-inf")))
    tl.store(f_base, (f * decay * scale).to(operand))
    e = tl.where(below, e * -decay, 0.0)
    tl.store(e_base, e.to(operand))
    e *= keys * k_unit[:, None] * k_unit[None, :]
    dbeta_row = tl.sum(e, 1)  # k . Z
    dgates += beta_row * dbeta_row
    k_both = tl.sum(share + e * beta_row[:, None], 0)
    k_dk += k_both
    dgates -= k_both
    tl.debug_barrier()

    into = tl.exp(gates)
    for k_block in tl.static_range(K_BLOCKS):
        i_k = k_block * BLOCK_K + tl.arange(0, BLOCK_K)
        k_tile = load_tile(k, k_token, left, i_k, K, BLOCK_K)
        q_tile = load_tile(q, q_token, left, i_k, K, BLOCK_K)
        e_tile = tl.load(e_base)
        f_tile = tl.load(f_base)
        dq_tile = tl.zeros([CHUNK, BLOCK_K], tl.float32)
        z_tile = tl.zeros([CHUNK, BLOCK_K], tl.float32)
        for block in tl.range(V_BLOCKS, num_stages=DEPTH):
            columns = block * BLOCK_V + tl.arange(0, BLOCK_V)
            do_tile = load_tile(do, do_token, left, columns, V, BLOCK_V)
            dr_tile = load_tile(dv, HEADS * V, left, columns, V, BLOCK_V)
            state = load_matrix(states, i_k, columns, K, V, BLOCK_K, BLOCK_V)
            dq_tile = tl.dot(do_tile, tl.trans(state), dq_tile)
            z_tile = tl.dot(dr_tile, tl.trans(state), z_tile)
        k_tile = k_tile.to(tl.float32) * k_unit[:, None]
        z_tile *= -into[:, None]
        share = tl.sum(k_tile * z_tile, 1)
        dbeta_row += share
        dgates += beta_row * share
        z_tile = tl.dot(e_tile, k_tile.to(operand), z_tile)
        store_tile(dk, HEADS * K, left, i_k, z_tile * beta_row[:, None], K)  # until Y is added
        q_tile = q_tile.to(tl.float32) * q_unit[:, None]
        dq_tile *= (into * scale)[:, None]
        share = tl.sum(q_tile * dq_tile, 1)
        q_dq += share
        dgates += share
        dq_tile = tl.dot(f_tile, k_tile.to(operand), dq_tile)
        if FINISH and NORMALIZE and K_BLOCKS == 1:
            dq_tile = (dq_tile - q_tile * q_dq[:, None]) * q_unit[:, None]
        store_tile(dq, HEADS * K, left, i_k, dq_tile, K)
    k_dk += beta_row * dbeta_row
    for block in tl.range(V_BLOCKS, num_stages=1):
        columns = block * BLOCK_V + tl.arange(0, BLOCK_V)
        dr_tile = load_tile(dv, HEADS * V, left, columns, V, BLOCK_V).to(tl.float32)
        dbeta_row += tl.sum(dr_tile * load_tile(v, v_token, left, columns, V, BLOCK_V), 1)
        store_tile(dv, HEADS * V, left, columns, dr_tile * beta_row[:, None], V)
    tl.debug_barrier()

    onto = tl.exp(last - gates)
    wrote = tl.zeros([CHUNK], tl.float32)
    dlast = 0.0
    for k_block in tl.static_range(K_BLOCKS):
        i_k = k_block * BLOCK_K + tl.arange(0, BLOCK_K)
        k_tile = load_tile(k, k_token, left, i_k, K, BLOCK_K)
        q_tile = load_tile(q, q_token, left, i_k, K, BLOCK_K)
        e_tile = tl.load(e_base)
        f_tile = tl.load(f_base)
        dk_tile = load_tile(dk, HEADS * K, left, i_k, K, BLOCK_K)
        y_tile = tl.zeros([CHUNK, BLOCK_K], tl.float32)
        kept = tl.zeros([BLOCK_K, BLOCK_K], tl.float32)  # S dS^T, of which the trace is wanted
        for block in tl.range(V_BLOCKS, num_stages=DEPTH):
            columns = block * BLOCK_V + tl.arange(0, BLOCK_V)
            u_tile = load_tile(u, HEADS * V, left, columns, V, BLOCK_V)
            state = load_matrix(states, i_k, columns, K, V, BLOCK_K, BLOCK_V)
            dstate = load_matrix(dstates, i_k, columns, K, V, BLOCK_K, BLOCK_V)
            y_tile = tl.dot(u_tile, tl.trans(dstate), y_tile)
            kept = tl.dot(state, tl.trans(dstate), kept)
        k_tile = k_tile.to(tl.float32) * k_unit[:, None]
        y_tile *= onto[:, None]
        share = tl.sum(k_tile * y_tile, 1)
        k_dk += share
        wrote += share
        trace = tl.sum(tl.where(i_k[:, None] == i_k[None, :], kept, 0.0))
        dlast += trace * tl.exp(last)
        q_tile = (q_tile.to(tl.float32) * q_unit[:, None]).to(operand)
        y_tile = tl.dot(tl.trans(f_tile), q_tile, y_tile)
        y_tile = tl.dot(tl.trans(e_tile), (k_tile * beta_row[:, None]).to(operand), y_tile)
        dk_tile += y_tile
        if FINISH and NORMALIZE and K_BLOCKS == 1:
            dk_tile = (dk_tile - k_tile * k_dk[:, None]) * k_unit[:, None]
        store_tile(dk, HEADS * K, left, i_k, dk_tile, K)
    if FINISH and NORMALIZE and K_BLOCKS > 1:
        # A row's sums were not whole until now: pass once more over what was just written.
        tl.debug_barrier()
        for k_block in tl.static_range(K_BLOCKS):
            i_k = k_block * BLOCK_K + tl.arange(0, BLOCK_K)
            q_tile = load_tile(q, q_token, left, i_k, K, BLOCK_K)
            k_tile = load_tile(k, k_token, left, i_k, K, BLOCK_K)
            dq_tile = load_tile(dq, HEADS * K, left, i_k, K, BLOCK_K)
            dk_tile = load_tile(dk, HEADS * K, left, i_k, K, BLOCK_K)
            dq_tile = (dq_tile - q_tile * (q_dq * q_unit)[:, None]) * q_unit[:, None]
            dk_tile = (dk_tile - k_tile * (k_dk * k_unit)[:, None]) * k_unit[:, None]
            store_tile(dq, HEADS * K, left, i_k, dq_tile, K)
            store_tile(dk, HEADS * K, left, i_k, dk_tile, K)

    at = token * HEADS + head + i * HEADS
    tl.store(dbeta + at, dbeta_row.to(dbeta.dtype.element_ty), mask=i < left)
    # A token's gate holds back what the state gets from tokens before it, and the state before the chunk; it is added
    # up as such, since the sum over all minus the sum from the token on would lose small decays to rounding.
    dg_row = tl.cumsum(dgates, 0, reverse=True) + tl.sum(tl.where(below, wrote[None, :], 0.0), 1) + dlast
    tl.store(dg + at, dg_row.to(dg.dtype.element_ty), mask=i < left)


@triton.jit(do_not_specialize=["tokens"])
def finish_kernel(
    x, dx_parts, dx, tokens,
    x_token: tl.constexpr, x_head: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """dx [tokens, HEADS, K] from ``dx_parts`` [tokens, HEADS * GROUP, K]: summed over the group, then through the
    normalization of x. One program C tokens and a head; a whole row in each."""
    program = tl.program_id(0)
    head, token = program % HEADS, (program // HEADS).to(tl.int64) * CHUNK
    left = (tokens - token).to(tl.int32)
    i_k = tl.arange(0, BLOCK_K)
    dx_tile = tl.zeros([CHUNK, BLOCK_K], tl.float32)
    for member in range(GROUP):
        part = dx_parts + ((token * HEADS + head) * GROUP + member) * K
        dx_tile += load_tile(part, HEADS * GROUP * K, left, i_k, K, BLOCK_K)
    if NORMALIZE:
        x_tile = load_tile(x + token * x_token + head * x_head, x_token, left, i_k, K, BLOCK_K).to(tl.float32)
        unit = tl.rsqrt(tl.sum(x_tile * x_tile, 1) + L2_EPS)
        x_tile *= unit[:, None]
        dx_tile = (dx_tile - x_tile * tl.sum(x_tile * dx_tile, 1)[:, None]) * unit[:, None]
    store_tile(dx + (token * HEADS + head) * K, HEADS * K, left, i_k, dx_tile, K)
