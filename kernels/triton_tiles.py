"""Tiles of the walks: from and to memory, by the copy engine or by pointers, and products of their blocks.

A state is held turned, [BLOCK_V, K], in blocks of K (see ``triton_sweep``), and so are products with it.
"""

import triton
import triton.language as tl

from widthwise.kernels.triton_prepare import CHUNK, load_tile


@triton.jit
def store_tile(base, stride, left, columns, tile, WIDTH: tl.constexpr):
    """The mirror of ``load_tile``."""
    i = tl.arange(0, CHUNK)
    mask = (i < left)[:, None] & (columns < WIDTH)[None, :]
    tl.store(base + i[:, None] * stride + columns[None, :], tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def load_states(given, matrix, columns, between, at, at_edge, K: tl.constexpr, V: tl.constexpr,
                BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, GIVEN: tl.constexpr, BETWEEN: tl.constexpr):  # fmt: skip
    """Columns of a [K, V] matrix, turned: for every block of K [BLOCK_V, BLOCK_K] fp32. At the edge of a sequence it
    is number ``matrix`` of ``given``, zero unless GIVEN; elsewhere number ``at`` of ``between``, zero unless BETWEEN.
    """
    tiles = ()
    for block in tl.static_range((K + BLOCK_K - 1) // BLOCK_K):
        i = block * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = (i < K)[None, :]
        places = i[None, :] * V + columns[:, None]
        tile = tl.zeros([BLOCK_V, BLOCK_K], tl.float32)
        if BETWEEN:
            mask = (columns < tl.where(at_edge, 0, V))[:, None] & inside
            tile += tl.load(between + at * K * V + places, mask=mask, other=0.0)
        if GIVEN:
            mask = (columns < tl.where(at_edge, V, 0))[:, None] & inside
            tile += tl.load(given + matrix * K * V + places, mask=mask, other=0.0)
        tiles += (tile,)  # type: ignore[assignment]
    return tiles


@triton.jit
def store_state(state, at, column, tiles, block: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
                BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, DESCRIBED: tl.constexpr):  # fmt: skip
    """Block number ``block`` of what ``load_states`` loads, if there are as many, cast to the type of ``state``, which
    may be a descriptor of [matrices, K, V]. Before a store the copy engine must have fetched what the one before it
    stores: let there be work in between."""
    if block < len(tiles):
        tile = tl.trans(tiles[block])
        if DESCRIBED:
            state.store([at.to(tl.int32), block * BLOCK_K, column], tl.reshape(tile, [1, BLOCK_K, BLOCK_V]))
        else:
            i, columns = block * BLOCK_K + tl.arange(0, BLOCK_K), column + tl.arange(0, BLOCK_V)
            mask = (i < K)[:, None] & (columns < V)[None, :]
            pointers = state + at * K * V + i[:, None] * V + columns[None, :]
            tl.store(pointers, tile.to(state.dtype.element_ty), mask=mask)


@triton.jit
def store_states(state, at, column, tiles, K: tl.constexpr, V: tl.constexpr,
                 BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr):  # fmt: skip
    """The mirror of ``load_states``."""
    for block in tl.static_range(len(tiles)):
        store_state(state, at, column, tiles, block, K, V, BLOCK_K, BLOCK_V, False)


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
def fetch_blocks(x, n, step, head, token, left, x_token, x_head,
                 WIDTH: tl.constexpr, BLOCK: tl.constexpr, DESCRIBED: tl.constexpr):  # fmt: skip
    """``fetch`` of every block of x's width."""
    tiles = ()
    for block in tl.static_range((WIDTH + BLOCK - 1) // BLOCK):
        tiles += (fetch(x, n, step, head, block * BLOCK, token, left, x_token, x_head, WIDTH, BLOCK, DESCRIBED),)  # type: ignore[assignment]
    return tiles


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
def put(x, n, step, head, column, token, left, turned,
        HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, DESCRIBED: tl.constexpr):  # fmt: skip
    """The mirror of ``fetch`` for a result x [B, T, HEADS, WIDTH] and a tile ``turned`` [BLOCK, C]."""
    tile = tl.trans(turned)
    if DESCRIBED:
        x.store([n, head, step * CHUNK, column], tl.reshape(tile, [1, 1, CHUNK, BLOCK]))
    else:
        store_tile(x + (token * HEADS + head) * WIDTH, HEADS * WIDTH, left, column + tl.arange(0, BLOCK), tile, WIDTH)


@triton.jit
def cast(tiles, dtype: tl.constexpr):
    """Every block in another type."""
    out = ()
    for block in tl.static_range(len(tiles)):
        out += (tiles[block].to(dtype),)  # type: ignore[assignment]
    return out


@triton.jit
def times(tiles, factor):
    """Every block times a number."""
    out = ()
    for block in tl.static_range(len(tiles)):
        out += (tiles[block] * factor,)  # type: ignore[assignment]
    return out


@triton.jit
def applied(state, tiles):
    """(X S)^T [BLOCK_V, C] of the blocks of S^T and of X [C, K]."""
    out = tl.dot(state[0], tl.trans(tiles[0]))
    for block in tl.static_range(1, len(tiles)):
        out = tl.dot(state[block], tl.trans(tiles[block]), out)
    return out


@triton.jit
def added(state, decay, turned, tiles):
    """The blocks of (decay S + X^T Y)^T, X [C, K] in blocks, Y^T ``turned`` [BLOCK_V, C]."""
    out = ()
    for block in tl.static_range(len(tiles)):
        out += (tl.dot(turned, tiles[block], state[block] * decay),)  # type: ignore[assignment]
    return out


@triton.jit
def widened(x):
    """As fp32; bf16 by moving its bits, since the conversion runs at a quarter of the rate."""
    if x.dtype == tl.bfloat16:
        x = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)
