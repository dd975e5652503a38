"""The gradients of a chunk, from the states at its two ends alone: every chunk at once.

With S the state before the chunk, dS the gradient of the state after it, u, dr from ``triton_sweep``, and exponents
of gate differences written exp(i - j), the chunk's share of each gradient is (q, k normalized, mask i >= j or i > j)

    F[i, j] = scale exp(i - j) do_i . u_j          E[i, j] = exp(i - j) dr_i . u_j
    dq = scale exp(G) do S^T + F k                  Z = -exp(G) dr S^T - E k
    dk = beta Z + Y,   Y = exp(G_last - G) u dS^T + F^T q - (beta E)^T k
    dv = beta dr       dbeta = dr . v + k . Z       dG = q . dq + beta k . Z - k . Y

The last holds because q_i only ever appears as exp(G_i) q_i, k_i as exp(G_i) k_i where it reads and as exp(-G_i) k_i
where it writes. dg is the sum of dG from its token on, plus the gradient of G_last.

Normalized q and k are never formed. With a, b the reciprocal norms of a row of q and of k, the kernel computes a dq and
b dk, the gradients of the raw rows for constant norms, from raw q, k: a and b go into F and E. The part along the row
is then taken out, a dq - q a^2 (q . a dq), where the sum is one that dG needs as well.
"""

import triton
import triton.language as tl

from widthwise.kernels.triton_prepare import (
    CHUNK,
    L2_EPS,
    ROW_BETA,
    ROW_G,
    ROW_K,
    ROW_Q,
    ROW_WRITE,
    ROWS,
    load_tile,
    locate_chunk,
)
from widthwise.kernels.triton_tiles import store_tile


@triton.jit
def load_matrix(base, rows, columns, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr):
    """Tile [BLOCK_K, BLOCK_V] of a [K, V] matrix, zero outside it."""
    pointers = base + rows[:, None] * V + columns[None, :]
    if K % BLOCK_K == 0 and V % BLOCK_V == 0:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=(rows < K)[:, None] & (columns < V)[None, :], other=0.0)
    return tile


@triton.jit
def decay_of_pairs(gates, k_unit):
    """exp(i - j) times the reciprocal norm of k_j, zero for i < j: [C, C]."""
    i = tl.arange(0, CHUNK)
    return tl.exp(tl.where(i[:, None] >= i[None, :], gates[:, None] - gates[None, :], float("-inf"))) * k_unit[None, :]


@triton.jit
def attention_in_fp32(q, k, q_token, k_token, left, gates, q_unit, k_unit, scale,
                      K: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """P [C, C] once more: where all gates are strong, it is below fp16's range for all pairs."""
    pairs = tl.zeros([CHUNK, CHUNK], tl.float32)
    for block in tl.static_range((K + BLOCK_K - 1) // BLOCK_K):
        columns = block * BLOCK_K + tl.arange(0, BLOCK_K)
        q_tile = load_tile(q, q_token, left, columns, K, BLOCK_K)
        k_tile = load_tile(k, k_token, left, columns, K, BLOCK_K)
        pairs += tl.dot(q_tile, tl.trans(k_tile))
    return pairs * decay_of_pairs(gates, k_unit) * (q_unit * scale)[:, None]


@triton.jit
def less_product(x, a, b):
    """x - a b. As a - because Triton turns x + a b into a dot that starts from x, and then, since one dot follows
    another, lays eight warps along the 64 rows."""
    return x - tl.dot(a, b)


@triton.jit
def from_pairs(f, e, keys, mix, gates, q_unit, k_unit, beta_row, scale, f_pairs, e_pairs, stride, left):
    """What the pairs of a chunk give, from f = do u^T, e = dr u^T, keys = k k^T and the attention ``mix``, [C, C]:
    their shares [C] in q . dq, k . dk, dG and k . Z, and, in memory, -a F b and beta b E b.

    What a pair i > j adds to dG at i it takes at j, to the last bit: from q . dq - k . Y the rounding would stay.
    """
    i = tl.arange(0, CHUNK)
    below = i[:, None] > i[None, :]
    same = i[:, None] == i[None, :]
    share = f * mix
    k_dk = tl.sum(tl.where(same, share, 0.0), 1)
    share = tl.where(below, share, 0.0)
    dgates = tl.sum(share, 1)
    q_dq = dgates + k_dk
    decay = decay_of_pairs(gates, k_unit)
    f *= -decay * (q_unit * scale)[:, None]
    store_tile(f_pairs, stride, left, i, f, CHUNK)
    e = tl.where(below, e * decay * k_unit[:, None], 0.0)
    store_tile(e_pairs, stride, left, i, e * beta_row[:, None], CHUNK)
    e *= -keys
    k_z = tl.sum(e, 1)
    k_dk += beta_row * k_z
    dgates += beta_row * k_z
    k_both = tl.sum(share + e * beta_row[:, None], 0)
    k_dk += k_both
    dgates -= k_both
    return q_dq, k_dk, dgates, k_z


@triton.jit(do_not_specialize=["T", "scale"])
def gradients_kernel(
    q, k, v, do, u, dv, states, dstates, rows, attention, f_pairs, e_pairs, dq, dk, dg, dbeta,
    cu_seqlens, chunk_offsets, chunk_sequence, T, scale,
    q_token: tl.constexpr, q_head: tl.constexpr, k_token: tl.constexpr, k_head: tl.constexpr,
    v_token: tl.constexpr, v_head: tl.constexpr,
    do_token: tl.constexpr, do_head: tl.constexpr, PAIRS_WIDTH: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    VARLEN: tl.constexpr, NORMALIZE: tl.constexpr, FINISH: tl.constexpr,
):  # fmt: skip
    """One program a chunk and value head: dv (which holds dr on entry), dg, dbeta [B, T, HV(, V)], dq and dk.

    With FINISH, dq and dk are final; without, they are those for constant norms, a value head each [B, T, HV, K], and
    ``finish_kernel`` does the rest. -a F b and beta b E b [B, T, HV, PAIRS_WIDTH], of which the first C columns, may
    live where dq and dk will.
    """
    K_BLOCKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    program = tl.program_id(0)
    head, chunk = program % HEADS, (program // HEADS).to(tl.int64)
    _, _, token, left = locate_chunk(chunk, T, cu_seqlens, chunk_offsets, chunk_sequence, VARLEN)
    if left <= 0:
        return
    q += token * q_token + (head // GROUP) * q_head
    k += token * k_token + (head // GROUP) * k_head
    v += token * v_token + head * v_head
    do += token * do_token + head * do_head
    u += (token * HEADS + head) * V
    dv += (token * HEADS + head) * V
    dq += (token * HEADS + head) * K
    dk += (token * HEADS + head) * K
    f_pairs += (token * HEADS + head) * PAIRS_WIDTH
    e_pairs += (token * HEADS + head) * PAIRS_WIDTH
    states += (chunk * HEADS + head) * K * V
    dstates += (chunk * HEADS + head) * K * V

    i = tl.arange(0, CHUNK)
    rows += (chunk * HEADS + head) * ROWS * CHUNK + i
    below = i[:, None] > i[None, :]
    i_v = tl.arange(0, BLOCK_V)

    # Loads go out long before they are wanted.
    do_tile = load_tile(do, do_token, left, i_v, V, BLOCK_V)
    dr_tile = load_tile(dv, HEADS * V, left, i_v, V, BLOCK_V)
    u_tile = load_tile(u, HEADS * V, left, i_v, V, BLOCK_V)
    i_k = tl.arange(0, BLOCK_K)
    k_tile = load_tile(k, k_token, left, i_k, K, BLOCK_K)
    v_tile = load_tile(v, v_token, left, i_v, V, BLOCK_V)
    HALF: tl.constexpr = q.dtype.element_ty == tl.float16
    if not HALF:
        mix = tl.load(attention + (chunk * HEADS + head) * CHUNK * CHUNK + i[:, None] * CHUNK + i[None, :])
    gates = tl.load(rows + ROW_G * CHUNK)
    k_unit = tl.load(rows + ROW_K * CHUNK)
    q_unit = tl.load(rows + ROW_Q * CHUNK)
    beta_row = tl.load(rows + ROW_BETA * CHUNK)
    f = tl.dot(do_tile, tl.trans(u_tile))
    e = tl.dot(dr_tile, tl.trans(u_tile))
    keys = tl.dot(k_tile, tl.trans(k_tile))
    for k_block in tl.static_range(1, K_BLOCKS):
        more = load_tile(k, k_token, left, k_block * BLOCK_K + i_k, K, BLOCK_K)
        keys += tl.dot(more, tl.trans(more))
    q_tile = load_tile(q, q_token, left, i_k, K, BLOCK_K)
    state = load_matrix(states, i_k, i_v, K, V, BLOCK_K, BLOCK_V)
    if HALF:
        mix = attention_in_fp32(q, k, q_token, k_token, left, gates, q_unit, k_unit, scale, K, BLOCK_K)
    q_dq, k_dk, dgates, dbeta_row = from_pairs(
        f, e, keys, mix, gates, q_unit, k_unit, beta_row, scale, f_pairs, e_pairs, HEADS * PAIRS_WIDTH, left
    )
    dbeta_row += tl.sum(dr_tile.to(tl.float32) * v_tile, 1)
    store_tile(dv, HEADS * V, left, i_v, dr_tile.to(tl.float32) * beta_row[:, None], V)
    tl.debug_barrier()
    f_tile = load_tile(f_pairs, HEADS * PAIRS_WIDTH, left, i, CHUNK, CHUNK)
    e_tile = load_tile(e_pairs, HEADS * PAIRS_WIDTH, left, i, CHUNK, CHUNK)
    tl.debug_barrier()

    dlast = 0.0
    wrote = tl.zeros([CHUNK], tl.float32)
    for k_block in tl.static_range(K_BLOCKS):
        i_k = k_block * BLOCK_K + tl.arange(0, BLOCK_K)
        if k_block > 0:
            k_tile = load_tile(k, k_token, left, i_k, K, BLOCK_K)
            q_tile = load_tile(q, q_token, left, i_k, K, BLOCK_K)
            state = load_matrix(states, i_k, i_v, K, V, BLOCK_K, BLOCK_V)
        dstate = load_matrix(dstates, i_k, i_v, K, V, BLOCK_K, BLOCK_V)
        dq_tile = tl.dot(do_tile, tl.trans(state))
        dk_tile = tl.dot(dr_tile, tl.trans(state))
        y_tile = tl.dot(u_tile, tl.trans(dstate))
        dlast += tl.sum(state.to(tl.float32) * dstate)
        dq_tile *= (tl.exp(gates) * q_unit * scale)[:, None]
        dk_tile *= -(tl.exp(gates) * k_unit)[:, None]
        y_tile *= tl.load(rows + ROW_WRITE * CHUNK)[:, None]
        q_share = tl.sum(q_tile * dq_tile, 1)
        k_share = tl.sum(k_tile * dk_tile, 1)
        wrote += tl.sum(k_tile * y_tile, 1)
        q_dq += q_share
        dbeta_row += k_share
        k_share *= beta_row
        k_dk += k_share
        dgates += q_share + k_share
        dq_tile = less_product(dq_tile, f_tile, k_tile)
        if FINISH and NORMALIZE and K_BLOCKS == 1:
            dq_tile -= q_tile * (q_dq * q_unit * q_unit)[:, None]
        store_tile(dq, HEADS * K, left, i_k, dq_tile, K)
        dk_tile = dk_tile * beta_row[:, None] + y_tile
        dk_tile = less_product(dk_tile, e_tile, k_tile)
        dk_tile = less_product(dk_tile, tl.trans(e_tile), k_tile)
        dk_tile = less_product(dk_tile, tl.trans(f_tile), q_tile)
        if FINISH and NORMALIZE and K_BLOCKS == 1:
            dk_tile -= k_tile * ((k_dk + wrote) * k_unit * k_unit)[:, None]
        store_tile(dk, HEADS * K, left, i_k, dk_tile, K)
    k_dk += wrote
    dlast *= tl.exp(tl.load(rows - i + ROW_G * CHUNK + CHUNK - 1))
    if FINISH and NORMALIZE and K_BLOCKS > 1:
        # A row's sums were not whole until now: pass once more over what was just written.
        tl.debug_barrier()
        for k_block in tl.static_range(K_BLOCKS):
            i_k = k_block * BLOCK_K + tl.arange(0, BLOCK_K)
            q_tile = load_tile(q, q_token, left, i_k, K, BLOCK_K)
            k_tile = load_tile(k, k_token, left, i_k, K, BLOCK_K)
            dq_tile = load_tile(dq, HEADS * K, left, i_k, K, BLOCK_K)
            dk_tile = load_tile(dk, HEADS * K, left, i_k, K, BLOCK_K)
            dq_tile -= q_tile * (q_dq * q_unit * q_unit)[:, None]
            dk_tile -= k_tile * (k_dk * k_unit * k_unit)[:, None]
            store_tile(dq, HEADS * K, left, i_k, dq_tile, K)
            store_tile(dk, HEADS * K, left, i_k, dk_tile, K)

    at = token * HEADS + head + i * HEADS
    tl.store(dbeta + at, dbeta_row.to(dbeta.dtype.element_ty), mask=i < left)
    # A token's gate holds back what the state gets from tokens before it, and the state before the chunk; it is added
    # up as such, since the sum over all minus the sum from the token on would lose small decays to rounding.
    dg_row = tl.cumsum(dgates, 0, reverse=True) + tl.sum(tl.where(below, wrote[None, :], 0.0), 1) + dlast
    tl.store(dg + at, dg_row.to(dg.dtype.element_ty), mask=i < left)


@triton.jit(do_not_specialize=["tokens"])
def normalize_kernel(
    x, unit, tokens,
    x_token: tl.constexpr, x_head: tl.constexpr, HEADS: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """unit [tokens, HEADS, K]: rows of x over their norms. One program C tokens and a head."""
    program = tl.program_id(0)
    head, token = program % HEADS, (program // HEADS).to(tl.int64) * CHUNK
    left = (tokens - token).to(tl.int32)
    i_k = tl.arange(0, BLOCK_K)
    x_tile = load_tile(x + token * x_token + head * x_head, x_token, left, i_k, K, BLOCK_K).to(tl.float32)
    x_tile *= tl.rsqrt(tl.sum(x_tile * x_tile, 1) + L2_EPS)[:, None]
    store_tile(unit + (token * HEADS + head) * K, HEADS * K, left, i_k, x_tile, K)


@triton.jit(do_not_specialize=["tokens"])
def finish_kernel(
    x, dx_parts, dx, factor, tokens,
    x_token: tl.constexpr, x_head: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr,
    NORMALIZE: tl.constexpr, UNIT: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """dx [tokens, HEADS, K] from ``dx_parts`` [tokens, HEADS * GROUP, K]: summed over the group, with SCALED times
    ``factor``, with NORMALIZE through the normalization of x: for constant norms first, if with UNIT that is still to
    be done, then without the part along x. One program C tokens and a head; a whole row in each."""
    program = tl.program_id(0)
    head, token = program % HEADS, (program // HEADS).to(tl.int64) * CHUNK
    left = (tokens - token).to(tl.int32)
    i_k = tl.arange(0, BLOCK_K)
    dx_tile = tl.zeros([CHUNK, BLOCK_K], tl.float32)
    for member in range(GROUP):
        part = dx_parts + ((token * HEADS + head) * GROUP + member) * K
        dx_tile += load_tile(part, HEADS * GROUP * K, left, i_k, K, BLOCK_K)
    if SCALED:
        dx_tile *= tl.load(factor)
    if NORMALIZE:
        x_tile = load_tile(x + token * x_token + head * x_head, x_token, left, i_k, K, BLOCK_K).to(tl.float32)
        square = tl.sum(x_tile * x_tile, 1) + L2_EPS
        if UNIT:
            dx_tile *= tl.rsqrt(square)[:, None]
        share = tl.sum(x_tile * dx_tile, 1) / square
        dx_tile -= x_tile * share[:, None]
    store_tile(dx + (token * HEADS + head) * K, HEADS * K, left, i_k, dx_tile, K)
