"""One sequence walked in several places at once, exactly.

A walk goes chunk by chunk, so with few heads and a long sequence most of the chip would wait. A segment of chunks
turns the state before it into M S + N, with M [K, K] and N [K, V] that depend on its tokens alone: N is what a walk
makes of no state, column k of M what it makes of the unit state e_k when no values are written. So all segments are
walked once without output, from 0 and from the identity; a short product along the segments gives the states they
start from; then all are walked again, from these. The gradient of the state before a segment is M^T times that after
it plus a part of its own, with the same M, so the backward walk splits likewise.
"""

import triton
import triton.language as tl

from widthwise.kernels.triton_prepare import CHUNK, locate_sequence
from widthwise.kernels.triton_sweep import walk_backwards, walk_forwards
from widthwise.kernels.triton_tiles import load_states, store_states


@triton.jit(do_not_specialize=["T", "segments", "span"])
def transfer_kernel(
    q, k, v, rows, inverse, attention, initial, moved, maps, T, segments, span,
    q_token: tl.constexpr, q_head: tl.constexpr, k_token: tl.constexpr, k_head: tl.constexpr,
    v_token: tl.constexpr, v_head: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, INITIAL: tl.constexpr, DEPTH: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """moved [N, segments - 1, HV, K, V], maps [N, segments - 1, HV, K, K]: N and M of all segments but the last.

    The first has the state it starts from instead of 0 in N, and no M. One program a sequence, segment, value head
    and block of the columns of N and M.
    """
    V_BLOCKS: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    BLOCKS: tl.constexpr = V_BLOCKS + (K + BLOCK_V - 1) // BLOCK_V
    block, program = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    head, program = program % HEADS, program // HEADS
    segment, n = program % (segments - 1), program // (segments - 1)
    of_values = block < V_BLOCKS
    if segment == 0 and block >= V_BLOCKS:
        return
    column = tl.where(of_values, block, block - V_BLOCKS) * BLOCK_V
    columns = column + tl.arange(0, BLOCK_V)
    begin, length, first = locate_sequence(n, T, None, None, False)
    at = (n.to(tl.int64) * (segments - 1) + segment) * HEADS + head
    state = load_states(
        initial, n.to(tl.int64) * HEADS + head, columns, rows, 0, segment == 0, K, V, BLOCK_K, BLOCK_V, INITIAL, False
    )
    unit = columns[:, None] == tl.arange(0, BLOCK_K)[None, :]
    state = (tl.where(of_values, state[0], tl.where(unit, 1.0, 0.0)),)
    state = walk_forwards(
        state, q, k, v, rows, inverse, attention, v, v, begin, length, first,
        segment * span, (segment + 1) * span, n, head, tl.where(of_values, column, 0), of_values,
        q_token, q_head, k_token, k_head, v_token, v_head,
        HEADS, GROUP, K, V, BLOCK_K, BLOCK_V, False, False, False, DEPTH, DESCRIBED,
    )  # fmt: skip
    if of_values:
        store_states(moved, at, column, state, K, V, BLOCK_K, BLOCK_V)
    else:
        store_states(maps, at, column, state, K, K, BLOCK_K, BLOCK_V)


@triton.jit(do_not_specialize=["T", "segments", "span", "least"])
def dtransfer_kernel(
    q, k, do, rows, inverse, attention, dfinal, moved, T, segments, span, least,
    q_token: tl.constexpr, q_head: tl.constexpr, k_token: tl.constexpr, k_head: tl.constexpr,
    do_token: tl.constexpr, do_head: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, FINAL: tl.constexpr, DEPTH: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """moved [N, segments - 1, HV, K, V]: the gradient before each segment but the first, of 0 after it, or, for the
    last segment, of the final state's."""
    V_BLOCKS: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    column, program = (tl.program_id(0) % V_BLOCKS) * BLOCK_V, tl.program_id(0) // V_BLOCKS
    head, program = program % HEADS, program // HEADS
    segment, n = program % (segments - 1) + 1, program // (segments - 1)
    begin, length, first = locate_sequence(n, T, None, None, False)
    last = segment == segments - 1
    dstate = load_states(
        dfinal, n.to(tl.int64) * HEADS + head, column + tl.arange(0, BLOCK_V), rows, 0, last,
        K, V, BLOCK_K, BLOCK_V, FINAL, False,
    )  # fmt: skip
    stop = tl.minimum((segment + 1) * span, tl.cdiv(length, CHUNK))
    dstate = walk_backwards(
        dstate, q, k, do, rows, inverse, attention, do, do, begin, length, first, segment * span, stop,
        n, head, column, least,
        q_token, q_head, k_token, k_head, do_token, do_head,
        HEADS, GROUP, K, V, BLOCK_K, BLOCK_V, False, DEPTH, DESCRIBED,
    )  # fmt: skip
    at = (n.to(tl.int64) * (segments - 1) + segment - 1) * HEADS + head
    store_states(moved, at, column, dstate, K, V, BLOCK_K, BLOCK_V)


@triton.jit(do_not_specialize=["joints"])
def join_kernel(
    moved, maps, joints,
    HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    BACKWARDS: tl.constexpr,
):  # fmt: skip
    """``moved`` [N, joints, HV, K, V] in place, from what each segment adds to what there is at the joints: forwards
    X_j = M_j X_(j-1) + N_j, backwards X_j = M_(j+1)^T X_(j+1) + N_j. One program a sequence, head and block of V."""
    PART: tl.constexpr = 64 if BLOCK_K > 64 else BLOCK_K  # of the K terms of a product, for it to fit
    V_BLOCKS: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    columns = (tl.program_id(0) % V_BLOCKS) * BLOCK_V + tl.arange(0, BLOCK_V)
    head, n = (tl.program_id(0) // V_BLOCKS) % HEADS, tl.program_id(0) // (V_BLOCKS * HEADS)
    i = tl.arange(0, BLOCK_K)
    at = (n.to(tl.int64) * joints + (joints - 1 if BACKWARDS else 0)) * HEADS + head
    for _ in range(1, joints):
        before = at
        at = at - HEADS if BACKWARDS else at + HEADS
        through = maps + (before if BACKWARDS else at) * K * K
        places = moved + at * K * V + i[None, :] * V + columns[:, None]
        mask = (columns < V)[:, None] & (i < K)[None, :]
        x = tl.load(places, mask=mask, other=0.0)
        for part in tl.range(0, K, PART, num_stages=1):
            j = part + tl.arange(0, PART)
            here = moved + before * K * V + j[None, :] * V + columns[:, None]
            known = tl.load(here, mask=(columns < V)[:, None] & (j < K)[None, :], other=0.0)
            inside = (j < K)[:, None] & (i < K)[None, :]
            if BACKWARDS:
                turned = tl.load(through + j[:, None] * K + i[None, :], mask=inside, other=0.0)
            else:
                turned = tl.load(through + i[None, :] * K + j[:, None], mask=inside, other=0.0)
            x = tl.dot(known, turned, x, input_precision="tf32x3")
        tl.store(places, x, mask=mask)
        tl.debug_barrier()
