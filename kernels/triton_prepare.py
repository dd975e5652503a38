"""What a chunk needs before any state is known: its gates, its inverse and its attention, all chunks at once.

Within a chunk of C tokens, with G the running sum of g, D[i, j] = beta_i exp(G_i - G_j) k_i . k_j for i > j, and
S the state the chunk starts from, the recurrence is the linear system (Yang et al. 2024, arXiv:2412.06464, sec. 3.3)

    (I + D) u = beta (v - exp(G) K S),    o = scale exp(G) Q S + P u,    P[i, j] = scale exp(G_i - G_j) q_i . k_j

The inverse of I + D and P depend on q, k, g and beta alone. Only these two [C, C] matrices and seven numbers a token
go through memory; normalized q and k never do, since a row's norm is one more factor in those numbers.
"""

import triton
import triton.language as tl

CHUNK = tl.constexpr(64)
L2_EPS = tl.constexpr(1e-6)
# A decay of exp(-104) or less is zero in fp32. Without the floor a g of -1e4 would swell the running sum until the
# differences of its neighbours drowned in rounding.
G_FLOOR = tl.constexpr(-104.0)

# Seven numbers a token, `rows[chunk, head, row, token]`, zero past the end where they scale what is read there:
#   G:     the running sum of g in the chunk
#   READ:  beta exp(G) |k|^-1          what K S is scaled by when the chunk reads the state
#   OUT:   scale exp(G) |q|^-1         the same for Q S
#                                      in fp16 both for G - G_first, to be in its range however strong the gates are
#   WRITE: exp(G_last - G) |k|^-1      what u is scaled by when the chunk writes the state
#   Q, K:  |q|^-1 and |k|^-1           or 1 where nothing is normalized, or what k is scaled by
#   BETA:  beta                        here too, since masks cost a walk a tenth of its instructions
ROWS = tl.constexpr(7)
ROW_G, ROW_READ, ROW_OUT, ROW_WRITE, ROW_Q, ROW_K, ROW_BETA = (tl.constexpr(i) for i in range(7))


@triton.jit
def locate_sequence(n, T, cu_seqlens, chunk_offsets, VARLEN: tl.constexpr):
    """(first token, length, first chunk) of sequence ``n``."""
    if VARLEN:
        begin = tl.load(cu_seqlens + n).to(tl.int64)
        length = (tl.load(cu_seqlens + n + 1) - begin).to(tl.int32)
        first = tl.load(chunk_offsets + n).to(tl.int64)
    else:
        begin = n.to(tl.int64) * T
        length = T
        first = n.to(tl.int64) * tl.cdiv(T, CHUNK)
    return begin, length, first


@triton.jit
def locate_chunk(chunk, T, cu_seqlens, chunk_offsets, chunk_sequence, VARLEN: tl.constexpr):
    """(sequence, chunk of that, first token, tokens left in the sequence) of ``chunk``; none are left where the chunk
    is only spare room."""
    if VARLEN:
        n = tl.load(chunk_sequence + chunk)
    else:
        n = chunk // tl.cdiv(T, CHUNK)
    begin, length, first = locate_sequence(n, T, cu_seqlens, chunk_offsets, VARLEN)
    step = chunk - first
    return n.to(tl.int32), step.to(tl.int32), begin + step * CHUNK, (length - step * CHUNK).to(tl.int32)


@triton.jit
def load_tile(base, stride, left, columns, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Tile [C, BLOCK_WIDTH] of the rows at ``base``, zero past the sequence (``left`` rows) and past WIDTH."""
    i = tl.arange(0, CHUNK)
    pointers = base + i[:, None] * stride + columns[None, :]
    if WIDTH % BLOCK_WIDTH == 0:
        tile = tl.load(pointers, mask=(i < left)[:, None], other=0.0)
    else:
        tile = tl.load(pointers, mask=(i < left)[:, None] & (columns < WIDTH)[None, :], other=0.0)
    return tile


@triton.jit
def join_pairs(inverse, lower, i, j, SIZE: tl.constexpr, OPERAND: tl.constexpr):
    """The inverse of diagonal blocks of twice SIZE from that of blocks of SIZE, A: A - A L A, L what lies between."""
    between = (i // SIZE != j // SIZE) & (i // (2 * SIZE) == j // (2 * SIZE))
    operand = inverse.to(OPERAND)
    step = tl.dot(operand, tl.where(between, lower, 0.0))
    return inverse - tl.dot(step.to(OPERAND), operand)


@triton.jit
def unit_lower_inverse(lower, OPERAND: tl.constexpr):
    """(I + lower)^-1 [C, C] for a strictly lower triangular ``lower``, by joining ever larger diagonal blocks.

    Blocks of 16 first, as a batch: each stays within a warp. OPERAND is what the matrix units multiply: fp16 has the
    mantissa of tf32 at twice its speed, but a range that is safe only where keys are normalized, since then no entry
    of an inverse exceeds beta.
    """
    BLOCKS: tl.constexpr = CHUNK // 16
    b = tl.arange(0, BLOCKS)
    diagonal = b[:, None, None, None] == b[None, None, :, None]
    blocks = tl.sum(tl.where(diagonal, tl.reshape(lower, [BLOCKS, 16, BLOCKS, 16]), 0.0), 2)
    i = tl.arange(0, 16)[None, :, None]
    j = tl.arange(0, 16)[None, None, :]
    small = tl.where(i == j, 1.0, 0.0) - tl.where((i // 2 == j // 2) & (i > j), blocks, 0.0)
    blocks, lower = blocks.to(OPERAND), lower.to(OPERAND)
    small = join_pairs(small, blocks, i, j, 2, OPERAND)
    small = join_pairs(small, blocks, i, j, 4, OPERAND)
    small = join_pairs(small, blocks, i, j, 8, OPERAND)
    inverse = tl.reshape(tl.where(diagonal, small[:, :, None, :], 0.0), [CHUNK, CHUNK])
    i = tl.arange(0, CHUNK)[:, None]
    j = tl.arange(0, CHUNK)[None, :]
    inverse = join_pairs(inverse, lower, i, j, 16, OPERAND)
    return join_pairs(inverse, lower, i, j, 32, OPERAND)


@triton.jit(do_not_specialize=["T", "scale"])
def prepare_kernel(
    q, k, g, beta, key_scale, rows, inverse, attention,
    cu_seqlens, chunk_offsets, chunk_sequence, T, scale,
    q_token: tl.constexpr, q_head: tl.constexpr, k_token: tl.constexpr, k_head: tl.constexpr,
    g_token: tl.constexpr, g_head: tl.constexpr, beta_token: tl.constexpr, beta_head: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr,
    VARLEN: tl.constexpr, NORMALIZE: tl.constexpr, SCALED: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """rows [chunks, HV, 7, C], inverse and attention [chunks, HV, C, C]; one program a chunk and value head."""
    program = tl.program_id(0)
    head, chunk = program % HEADS, (program // HEADS).to(tl.int64)
    _, _, token, left = locate_chunk(chunk, T, cu_seqlens, chunk_offsets, chunk_sequence, VARLEN)
    if left <= 0:
        return
    q += token * q_token + (head // GROUP) * q_head
    k += token * k_token + (head // GROUP) * k_head
    g += token * g_token + head * g_head
    beta += token * beta_token + head * beta_head

    i = tl.arange(0, CHUNK)
    g_row = tl.load(g + i * g_token, mask=i < left, other=0.0).to(tl.float32)
    beta_row = tl.load(beta + i * beta_token, mask=i < left, other=0.0).to(tl.float32)
    rows += (chunk * HEADS + head) * ROWS * CHUNK + i
    tl.store(rows + ROW_BETA * CHUNK, beta_row)
    kk = tl.zeros([CHUNK, CHUNK], tl.float32)
    qk = tl.zeros([CHUNK, CHUNK], tl.float32)
    q_square = tl.zeros([CHUNK], tl.float32)
    k_square = tl.zeros([CHUNK], tl.float32)
    for block in tl.static_range((K + BLOCK_K - 1) // BLOCK_K):
        columns = block * BLOCK_K + tl.arange(0, BLOCK_K)
        q_tile = load_tile(q, q_token, left, columns, K, BLOCK_K)
        k_tile = load_tile(k, k_token, left, columns, K, BLOCK_K)
        kk = tl.dot(k_tile, tl.trans(k_tile), kk)
        qk = tl.dot(q_tile, tl.trans(k_tile), qk)
        if NORMALIZE:
            q_square += tl.sum(q_tile.to(tl.float32) * q_tile.to(tl.float32), 1)
            k_square += tl.sum(k_tile.to(tl.float32) * k_tile.to(tl.float32), 1)
    if NORMALIZE:
        q_unit = tl.rsqrt(q_square + L2_EPS)
        k_unit = tl.rsqrt(k_square + L2_EPS)
    else:
        q_unit = tl.zeros([CHUNK], tl.float32) + 1.0
        k_unit = tl.zeros([CHUNK], tl.float32) + 1.0
    if SCALED:
        k_unit *= tl.load(key_scale)

    gates = tl.cumsum(tl.maximum(g_row, G_FLOOR), 0)
    last = tl.sum(tl.where(i == CHUNK - 1, gates, 0.0))
    tl.store(rows + ROW_G * CHUNK, gates)
    since = gates
    if attention.dtype.element_ty == tl.float16:
        since -= tl.sum(tl.where(i == 0, gates, 0.0))
    tl.store(rows + ROW_READ * CHUNK, beta_row * tl.exp(since) * k_unit)
    tl.store(rows + ROW_OUT * CHUNK, tl.exp(since) * q_unit * scale)
    tl.store(rows + ROW_WRITE * CHUNK, tl.exp(last - gates) * k_unit)
    tl.store(rows + ROW_Q * CHUNK, q_unit)
    tl.store(rows + ROW_K * CHUNK, k_unit)

    seen = i[:, None] >= i[None, :]
    decay = tl.exp(tl.where(seen, gates[:, None] - gates[None, :], float("-inf"))) * k_unit[None, :]
    square = (chunk * HEADS + head) * CHUNK * CHUNK + i[:, None] * CHUNK + i[None, :]
    tl.store(attention + square, (qk * decay * (q_unit * scale)[:, None]).to(attention.dtype.element_ty))
    lower = tl.where(i[:, None] > i[None, :], kk * decay * (beta_row * k_unit)[:, None], 0.0)
    tl.store(inverse + square, unit_lower_inverse(lower, OPERAND).to(inverse.dtype.element_ty))
