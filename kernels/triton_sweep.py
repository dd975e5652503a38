"""The sequential part: the state carried from chunk to chunk, forwards, and its gradient, backwards.

One program holds BLOCK_V columns of one head's state, turned, [BLOCK_V, K], and walks along the sequence; columns of
the state never meet, so V is split freely. With u the solution of the chunk's system (see ``triton_prepare``), c the
WRITE row and S the state before the chunk:

    forwards     u = inverse (beta v - READ K S);   o = OUT Q S + P u;   S <- exp(G_last) S + K^T (WRITE u)
    backwards    du = P^T do + WRITE K dS;   dr = inverse^T du;
                 dS <- exp(G_last) dS + Q^T (OUT do) - K^T (READ dr)

All of this is computed turned, S^T, u^T and so on: then the left operand of every dot is the result of the dot before
it, which Hopper's matrix units take from registers, and the right one is a tile that the copy engine left in shared
memory. Nothing of the chain from state to state passes through shared memory, or waits at a barrier for another warp.
K lies in blocks, each with its part of the state, so that 192 channels are not padded to 256.

For the backward pass the forward walk keeps u: from it the states come without the chain of dots, one product a chunk.
The backward walk needs neither, so both share one launch: half of the programs carry dS, the other half repeat the
states. What they leave in memory per chunk (S, dS, dr) makes every gradient computable from its chunk alone
(``triton_gradients``).
"""

import triton
import triton.language as tl

from widthwise.kernels.triton_prepare import (
    CHUNK,
    ROW_BETA,
    ROW_G,
    ROW_OUT,
    ROW_READ,
    ROW_WRITE,
    ROWS,
    locate_sequence,
)
from widthwise.kernels.triton_tiles import (
    added,
    applied,
    cast,
    fetch,
    fetch_blocks,
    fetch_square,
    load_states,
    put,
    store_state,
    store_states,
    times,
    widened,
)

SMALLEST = tl.constexpr(2.0**-126)  # of fp32's normal numbers


@triton.jit
def walk_forwards(
    state, q, k, v, rows, inverse, attention, o, u,
    begin, length, first, start, stop, n, head, column, written_to,
    q_token: tl.constexpr, q_head: tl.constexpr, k_token: tl.constexpr, k_head: tl.constexpr,
    v_token: tl.constexpr, v_head: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, OUTPUT: tl.constexpr, WIDE: tl.constexpr, KEEP: tl.constexpr,
    DEPTH: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """From ``state`` before chunk ``start`` of a sequence to the one returned, before chunk ``stop``.

    With OUTPUT: o; where it is WIDE, in fp32 and by pointers, described or not. With KEEP: u, for the backward pass.
    With neither, ``written_to`` says whether v is written to the state, or nothing.
    """
    i = tl.arange(0, CHUNK)
    ends = rows + ROW_G * CHUNK + CHUNK - 1
    last = tl.load(ends + ((first + start) * HEADS + head) * ROWS * CHUNK, mask=stop > start, other=0.0)
    for step in tl.range(start, stop, num_stages=DEPTH):
        token, left = begin + step * CHUNK, length - step * CHUNK
        at = (first + step) * HEADS + head
        here = rows + at * ROWS * CHUNK + i
        k_tiles = fetch_blocks(k, n, step, head // GROUP, token, left, k_token, k_head, K, BLOCK_K, DESCRIBED)
        v_tile = fetch(v, n, step, head, column, token, left, v_token, v_head, V, BLOCK_V, DESCRIBED)
        beta_row = tl.load(here + ROW_BETA * CHUNK)
        read_row = tl.load(here + ROW_READ * CHUNK)
        write_row = tl.load(here + ROW_WRITE * CHUNK)
        solve = fetch_square(inverse, at, DESCRIBED)

        if v_tile.dtype == tl.float16:
            read_row *= tl.exp(tl.load(rows + at * ROWS * CHUNK + ROW_G * CHUNK))
        operands = cast(state, v_tile.dtype)
        wanted = beta_row[None, :] * tl.trans(v_tile)
        if not (OUTPUT or KEEP):
            wanted = tl.where(written_to, wanted, 0.0)
        wanted -= read_row[None, :] * applied(operands, k_tiles)
        known = wanted.to(v_tile.dtype)
        if KEEP and v_tile.dtype == tl.bfloat16:
            # Where keys repeat, the inverse cancels most of this: gradients want what bf16 rounds away as well.
            u_turned = tl.dot((wanted - widened(known)).to(v_tile.dtype), tl.trans(solve))
            u_turned = tl.dot(known, tl.trans(solve), u_turned)
        else:
            u_turned = tl.dot(known, tl.trans(solve))
        if KEEP:
            # Rounded before it is written, so that what is kept gives the same states to the bit. What rounding adds to
            # a state here is wanted less in the next chunk; where u is known, nothing would take it out again.
            u_turned = u_turned.to(v_tile.dtype)
            put(u, n, step, head, column, token, left, u_turned, HEADS, V, BLOCK_V, DESCRIBED)
        if OUTPUT:
            q_tiles = fetch_blocks(q, n, step, head // GROUP, token, left, q_token, q_head, K, BLOCK_K, DESCRIBED)
            mix = fetch_square(attention, at, DESCRIBED)
            out_row = tl.load(here + ROW_OUT * CHUNK)
            if v_tile.dtype == tl.float16:
                out_row *= tl.exp(tl.load(rows + at * ROWS * CHUNK + ROW_G * CHUNK))
            out = applied(operands, q_tiles) * out_row[None, :]
            out = tl.dot(u_turned.to(v_tile.dtype), tl.trans(mix), out)
            if WIDE:
                put(o, n, step, head, column, token, left, out, HEADS, V, BLOCK_V, False)
            else:
                put(o, n, step, head, column, token, left, out.to(v_tile.dtype), HEADS, V, BLOCK_V, DESCRIBED)
        written = (write_row[None, :] * widened(u_turned)).to(v_tile.dtype)
        state = added(state, tl.exp(last), written, k_tiles)
        # The next chunk's last, by hand: a stage of it would take four bytes of shared memory too many.
        last = tl.load(ends + (at + HEADS) * ROWS * CHUNK, mask=step + 1 < stop, other=0.0)
    return state


@triton.jit
def walk_states(
    state, k, u, rows, states,
    begin, length, first, start, stop, n, head, column,
    k_token: tl.constexpr, k_head: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, DEPTH: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """The state before every chunk, from ``state`` before chunk ``start`` on, by u, which is known: no chain here."""
    i = tl.arange(0, CHUNK)
    ends = rows + ROW_G * CHUNK + CHUNK - 1
    last = tl.load(ends + ((first + start) * HEADS + head) * ROWS * CHUNK, mask=stop > start, other=0.0)
    for step in tl.range(start, stop, num_stages=DEPTH):
        token, left = begin + step * CHUNK, length - step * CHUNK
        at = (first + step) * HEADS + head
        k_tiles = fetch_blocks(k, n, step, head // GROUP, token, left, k_token, k_head, K, BLOCK_K, DESCRIBED)
        u_tile = fetch(u, n, step, head, column, token, left, HEADS * V, V, V, BLOCK_V, DESCRIBED)
        write_row = tl.load(rows + at * ROWS * CHUNK + ROW_WRITE * CHUNK + i)
        written = (write_row[None, :] * tl.trans(u_tile)).to(u_tile.dtype)
        before, after = cast(state, u_tile.dtype), ()
        for block in tl.static_range(len(state)):
            store_state(states, at, column, before, block, K, V, BLOCK_K, BLOCK_V, DESCRIBED)
            after += (tl.dot(written, k_tiles[block], state[block] * tl.exp(last)),)  # type: ignore[assignment]
        state = after
        last = tl.load(ends + (at + HEADS) * ROWS * CHUNK, mask=step + 1 < stop, other=0.0)


@triton.jit
def walk_backwards(
    dstate, q, k, do, rows, inverse, attention, dr, dstates,
    begin, length, first, start, stop, n, head, column, least,
    q_token: tl.constexpr, q_head: tl.constexpr, k_token: tl.constexpr, k_head: tl.constexpr,
    do_token: tl.constexpr, do_head: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, KEEP: tl.constexpr,
    DEPTH: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """From ``dstate``, the gradient of the state before chunk ``stop`` of a sequence, to that before chunk ``start``.

    With KEEP: dr, and the gradient of the state after every chunk. ``least``: in fp16, the magnitude of do, or next to
    nothing where do is zero.
    """
    i = tl.arange(0, CHUNK)
    ends = rows + ROW_G * CHUNK + CHUNK - 1
    last = tl.load(ends + ((first + stop - 1) * HEADS + head) * ROWS * CHUNK, mask=stop > start, other=0.0)
    frame = 1.0
    for back in tl.range(0, stop - start, num_stages=DEPTH):
        step = stop - 1 - back
        token, left = begin + step * CHUNK, length - step * CHUNK
        at = (first + step) * HEADS + head
        here = rows + at * ROWS * CHUNK + i
        k_tiles = fetch_blocks(k, n, step, head // GROUP, token, left, k_token, k_head, K, BLOCK_K, DESCRIBED)
        mix = fetch_square(attention, at, DESCRIBED)
        do_tile = fetch(do, n, step, head, column, token, left, do_token, do_head, V, BLOCK_V, DESCRIBED)
        solve = fetch_square(inverse, at, DESCRIBED)
        write_row = tl.load(here + ROW_WRITE * CHUNK)
        read_row = tl.load(here + ROW_READ * CHUNK)
        out_row = tl.load(here + ROW_OUT * CHUNK)
        q_tiles = fetch_blocks(q, n, step, head // GROUP, token, left, q_token, q_head, K, BLOCK_K, DESCRIBED)

        operands = cast(dstate, do_tile.dtype)
        do_turned = tl.trans(do_tile)
        decay = tl.exp(last)
        if do_tile.dtype == tl.float16:
            # What has decayed is below fp16's range. So dS is multiplied in units of ``scale``, what gates have left
            # of it; what is added to it is in units of ``ahead``: READ and OUT begin at 1 in fp16, and without do it is
            # what this chunk's gates leave of dS.
            begins = tl.exp(tl.load(rows + at * ROWS * CHUNK + ROW_G * CHUNK))
            scale = tl.maximum(frame, least)
            frame = scale * decay
            ahead = tl.maximum(frame, least * begins)
            over_ahead = 1 / tl.maximum(ahead, SMALLEST)
            decay *= over_ahead
            read_row *= begins * over_ahead * scale
            write_row *= scale
            multiplied = cast(times(dstate, 1 / scale), do_tile.dtype)
        else:
            multiplied = operands
        if KEEP:
            store_state(dstates, at, column, operands, 0, K, V, BLOCK_K, BLOCK_V, DESCRIBED)
        du = applied(multiplied, k_tiles) * write_row[None, :]
        if KEEP:
            store_state(dstates, at, column, operands, 1, K, V, BLOCK_K, BLOCK_V, DESCRIBED)
        du = tl.dot(do_turned, mix, du)
        if KEEP:
            store_state(dstates, at, column, operands, 2, K, V, BLOCK_K, BLOCK_V, DESCRIBED)
        if do_tile.dtype == tl.float16:
            du *= 1 / scale
        dr_turned = tl.dot(du.to(do_tile.dtype), solve)
        if KEEP:
            store_state(dstates, at, column, operands, 3, K, V, BLOCK_K, BLOCK_V, DESCRIBED)
        read = (-read_row[None, :] * dr_turned).to(do_tile.dtype)
        shown = (out_row[None, :] * do_turned).to(do_tile.dtype)
        dstate = added(dstate, decay, read, k_tiles)
        if do_tile.dtype == tl.float16:
            dr_turned *= scale
        if KEEP:
            put(dr, n, step, head, column, token, left, dr_turned.to(do_tile.dtype), HEADS, V, BLOCK_V, DESCRIBED)
        dstate = added(dstate, 1.0, shown, q_tiles)
        if do_tile.dtype == tl.float16:
            dstate = times(dstate, ahead)
        last = tl.load(ends + (at - HEADS) * ROWS * CHUNK, mask=step > start, other=0.0)
    return dstate


@triton.jit(do_not_specialize=["T", "segments", "span"])
def forward_kernel(
    q, k, v, rows, inverse, attention, o, u, initial, starts, final, cu_seqlens, chunk_offsets, T, segments, span,
    q_token: tl.constexpr, q_head: tl.constexpr, k_token: tl.constexpr, k_head: tl.constexpr,
    v_token: tl.constexpr, v_head: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, VARLEN: tl.constexpr, INITIAL: tl.constexpr, WIDE: tl.constexpr,
    KEEP: tl.constexpr, DEPTH: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """o [B, T, HV, V] and final [N, HV, K, V]; one program a sequence, segment of it, value head and block of V.

    A segment is ``span`` chunks; the states from which all but the first start are ``starts`` [N, segments - 1, HV,
    K, V] (``triton_split``).
    """
    V_BLOCKS: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    program = tl.program_id(0)
    column = (program % V_BLOCKS) * BLOCK_V
    head, program = (program // V_BLOCKS) % HEADS, program // (V_BLOCKS * HEADS)
    segment, n = program % segments, program // segments
    begin, length, first = locate_sequence(n, T, cu_seqlens, chunk_offsets, VARLEN)
    start, stop = segment * span, tl.minimum((segment + 1) * span, tl.cdiv(length, CHUNK))
    matrix = n.to(tl.int64) * HEADS + head
    columns = column + tl.arange(0, BLOCK_V)
    at = (n.to(tl.int64) * (segments - 1) + segment - 1) * HEADS + head
    state = load_states(initial, matrix, columns, starts, at, segment == 0, K, V, BLOCK_K, BLOCK_V, INITIAL, True)
    state = walk_forwards(
        state, q, k, v, rows, inverse, attention, o, u, begin, length, first, start, stop,
        n, head, column, True,
        q_token, q_head, k_token, k_head, v_token, v_head,
        HEADS, GROUP, K, V, BLOCK_K, BLOCK_V, True, WIDE, KEEP, DEPTH, DESCRIBED,
    )  # fmt: skip
    if segment == segments - 1:
        store_states(final, matrix, column, state, K, V, BLOCK_K, BLOCK_V)


@triton.jit(do_not_specialize=["T", "segments", "span", "least"])
def backward_kernel(
    q, k, do, u, rows, inverse, attention, dr, states, dstates,
    initial, starts, dfinal, dends, dinitial, cu_seqlens, chunk_offsets, T, segments, span, least,
    q_token: tl.constexpr, q_head: tl.constexpr, k_token: tl.constexpr, k_head: tl.constexpr,
    do_token: tl.constexpr, do_head: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, VARLEN: tl.constexpr, INITIAL: tl.constexpr, FINAL: tl.constexpr,
    DEPTH: tl.constexpr, STATES_DEPTH: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """dr [B, T, HV, V], states and dstates [chunks, HV, K, V]; two programs a sequence, segment, value head and block
    of V, of which those that take longer come first. ``dends`` [N, segments - 1, HV, K, V] is for the ends of all
    segments but the last what ``starts`` is for the beginnings of all but the first."""
    V_BLOCKS: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    half = tl.num_programs(0) // 2
    backwards = tl.program_id(0) < half
    program = tl.where(backwards, tl.program_id(0), tl.program_id(0) - half)
    column = (program % V_BLOCKS) * BLOCK_V
    head, program = (program // V_BLOCKS) % HEADS, program // (V_BLOCKS * HEADS)
    segment, n = program % segments, program // segments
    begin, length, first = locate_sequence(n, T, cu_seqlens, chunk_offsets, VARLEN)
    start, stop = segment * span, tl.minimum((segment + 1) * span, tl.cdiv(length, CHUNK))
    matrix = n.to(tl.int64) * HEADS + head
    columns = column + tl.arange(0, BLOCK_V)
    at = (n.to(tl.int64) * (segments - 1) + segment) * HEADS + head
    if backwards:
        dstate = load_states(
            dfinal, matrix, columns, dends, at, segment == segments - 1, K, V, BLOCK_K, BLOCK_V, FINAL, True
        )  # fmt: skip
        dstate = walk_backwards(
            dstate, q, k, do, rows, inverse, attention, dr, dstates, begin, length, first, start, stop,
            n, head, column, least,
            q_token, q_head, k_token, k_head, do_token, do_head,
            HEADS, GROUP, K, V, BLOCK_K, BLOCK_V, True, DEPTH, DESCRIBED,
        )  # fmt: skip
        if INITIAL and segment == 0:
            store_states(dinitial, matrix, column, dstate, K, V, BLOCK_K, BLOCK_V)
    else:
        state = load_states(
            initial, matrix, columns, starts, at - HEADS, segment == 0, K, V, BLOCK_K, BLOCK_V, INITIAL, True
        )  # fmt: skip
        walk_states(
            state, k, u, rows, states, begin, length, first, start, stop, n, head, column, k_token, k_head,
            HEADS, GROUP, K, V, BLOCK_K, BLOCK_V, STATES_DEPTH, DESCRIBED,
        )  # fmt: skip
