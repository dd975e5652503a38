"""The gated delta rule in chunks, in plain PyTorch: the backend for CPUs. Forward and a hand-written backward.

For one sequence and value head, within a chunk of C tokens entered with state S [K, V], let G be the running sum of g
from the chunk's start, e = exp(G), D_ij = exp(G_i - G_j) for i >= j (else 0), and write row scalings as products::

    A = beta * strictly_lower(K K^T * D)        what token i recalls of the writes of the tokens j before it
    U = (I + A)^-1 beta (V - e K S)             the writes themselves (the WY form: Yang et al. 2024, arXiv:2412.06464)
    O = scale (e Q S + (Q K^T * D) U)
    S' = e_C S + (D_C K)^T U                    D_C is D's last row

With W = (I + A)^-1 beta e K known, U - and so S' - is affine in S; that recurrence alone runs chunk by chunk, and
everything else is batched over chunks, heads and sequences. Q lies on top of K (``qk``), and dO on top of the gradient
of beta (V - e K S), so that products and passes that both need are done once, twice as tall.
Gradients that run through g only ever sum what they should and never take differences of prefix sums, so they keep
their relative accuracy however small the gates are.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from widthwise.kernels.reference import L2_EPS

CHUNK = 32
LEAF = 16  # triangular systems up to this size are solved directly
# exp(-1e4) is 0 in every dtype, so nothing is lost, and -inf becomes a number that can be subtracted.
LOWEST_GATE = -1e4


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """What states are held in, and what this backend computes in: fp32, or fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def chunk_bound(q: Tensor, cu_seqlens: Tensor | None) -> int:
    """How many chunks there are, or, where sequence lengths are unknown while tracing, at most can be."""
    batch, time = q.shape[:2]
    if cu_seqlens is None:
        return batch * ((time + CHUNK - 1) // CHUNK)
    return time // CHUNK + cu_seqlens.shape[0] - 1


@dataclass(frozen=True)
class Layout:
    """Which token sits in which row of which chunk.

    Chunks are ordered by their rank within their sequence, and sequences from the longest to the shortest, so that
    the chunks that can be stepped together are contiguous and belong to the first ``width`` sequences of ``order``.
    """

    order: Tensor  # [N] sequences, longest first
    steps: list[tuple[int, int]]  # per step of the recurrence, its range of chunks
    tokens: Tensor  # [M, C] index into the B*T tokens; 0 in padding
    padding: Tensor | None  # [M, C] bool, True in the rows past the end of a sequence; None if there are none
    places: Tensor  # [B*T] index of the token's row among the M*C
    grid: tuple[int, int] | None = (
        None  # (depth, B) where all sequences are whole chunks; tokens, places are then empty
    )

    @staticmethod
    def of(batch: int, time: int, cu_seqlens: Tensor | None, device: torch.device) -> "Layout":
        if cu_seqlens is None and time % CHUNK == 0:
            depth, none = time // CHUNK, torch.empty(0, dtype=torch.int64, device=device)
            steps = list(pairwise(range(0, depth * batch + 1, batch)))
            return Layout(torch.arange(batch, device=device), steps, none, None, none, (depth, batch))
        if cu_seqlens is None:
            bounds = torch.arange(0, batch * time + 1, time, device=device)
        else:
            bounds = cu_seqlens.to(torch.int64)
        starts, lengths = bounds[:-1], bounds.diff()
        order = lengths.argsort(descending=True, stable=True)
        starts, lengths = starts[order], lengths[order]
        depths = (lengths + CHUNK - 1) // CHUNK
        ranks = torch.arange(int(depths[0]), device=device)[:, None]
        active = ranks < depths
        rank, sequence = active.nonzero(as_tuple=True)
        ends = [0, *active.sum(1).cumsum(0).tolist()]
        offsets = rank[:, None] * CHUNK + torch.arange(CHUNK, device=device)
        valid = offsets < lengths[sequence, None]
        tokens = torch.where(valid, starts[sequence, None] + offsets, 0)
        places = torch.empty(batch * time, dtype=torch.int64, device=device)
        places[tokens[valid]] = valid.flatten().nonzero().squeeze(1)
        steps = list(pairwise(ends))
        return Layout(order, steps, tokens, None if bool(valid.all()) else ~valid, places)

    @property
    def chunks(self) -> int:
        return self.steps[-1][1]

    def gather(self, x: Tensor, value_heads: int, into: Tensor) -> Tensor:
        """[B, T, h, ...] -> ``into`` [M*HV, C, ...]: a head is repeated for the value heads it serves, padding is 0."""
        heads, rest = x.shape[2], x.shape[3:]
        groups = value_heads // heads
        if self.grid is not None:
            depth, batch = self.grid
            rows = torch.unflatten(x, 1, (depth, CHUNK)).permute(1, 0, 3, 2, *range(4, x.dim() + 1)).unsqueeze(3)
            torch.unflatten(into, 0, (depth, batch, heads, groups)).copy_(rows)
            return into
        served = torch.arange(value_heads, device=x.device) // groups
        index = self.tokens[:, None, :] * heads + served[:, None]  # [M, HV, C]
        into.copy_(x.reshape(-1, *rest).index_select(0, index.flatten()).view(-1, CHUNK, *rest))
        if self.padding is not None:
            into.masked_fill_(self.padding.repeat_interleave(value_heads, 0).view(-1, CHUNK, *[1] * len(rest)), 0)
        return into

    def scatter(self, chunks: Tensor, like: Tensor) -> Tensor:
        """[M*HV, C, ...] -> the shape and dtype of ``like``, [B, T, h, ...]: summed over the value heads that a head
        serves."""
        batch, time, heads = like.shape[:3]
        value_heads = chunks.shape[0] // self.chunks
        shape = (batch, time, heads, value_heads // heads, *like.shape[3:])
        if self.grid is not None:
            x = torch.unflatten(chunks, 0, (*self.grid, heads, shape[3])).permute(
                1, 0, 4, 2, 3, *range(5, chunks.dim() + 3)
            )
            if heads < value_heads:
                x = x.sum(4, keepdim=True)
            scattered = torch.empty(like.shape, dtype=like.dtype, device=like.device)
            scattered.view(x.shape).copy_(x)
            return scattered
        places = self.places[:, None]
        head = torch.arange(value_heads, device=chunks.device)
        rows = (places // CHUNK * value_heads + head) * CHUNK + places % CHUNK  # [B*T, HV]
        x = chunks.reshape(-1, *chunks.shape[2:]).index_select(0, rows.flatten()).view(shape)
        return (x.squeeze(3) if heads == value_heads else x.sum(3)).to(like.dtype)

    def states(self, given: Tensor | None, like: Tensor, heads: int, key_dim: int, value_dim: int) -> Tensor:
        """[N, HV, K, V], or zeros, -> [N*HV, K, V] in the order of the recurrence; always a fresh tensor."""
        if given is None:
            return like.new_zeros(self.order.shape[0] * heads, key_dim, value_dim)
        return given.to(like.dtype).index_select(0, self.order).flatten(0, 1)

    def unsort(self, states: Tensor) -> Tensor:
        """The reverse of :meth:`states`."""
        return states.view(self.order.shape[0], -1, *states.shape[1:]).index_select(0, self.order.argsort())


class Chunks(NamedTuple):
    """Z = M*HV chunks. All of it is kept for the backward pass: on a CPU memory is cheaper than computing again."""

    qk: Tensor  # [Z, 2C, K]    Q on top of K
    norms: Tensor  # [Z, 2C, 1] what qk was multiplied by to be normalized
    v: Tensor  # [Z, C, V]
    beta: Tensor  # [Z, C, 1]
    decay: Tensor  # [Z, C, C]  D
    into: Tensor  # [Z, C, 1]   e: from the chunk's start through token i
    out: Tensor  # [Z, C, 1]    D_C: from after token i to the chunk's end
    pairs: Tensor  # [Z, 2C, C] Q K^T * D on top of strictly_lower(K K^T * D), which is A without beta
    inverse: Tensor  # [Z, C, C] (I + A)^-1
    w: Tensor  # [Z, C, K]      (I + A)^-1 beta e K
    k_out: Tensor  # [Z, C, K]  D_C K
    u: Tensor  # [Z, C, V]      U; before the states are known, what it would be from S = 0
    entering: Tensor  # [Z, K, V] S

    @staticmethod
    def shapes(K: int, V: int) -> list[tuple[int, int]]:
        C, one = CHUNK, (CHUNK, 1)
        tall = [(2 * C, K), (2 * C, 1)]
        return [*tall, (C, V), one, (C, C), one, one, (2 * C, C), (C, C), (C, K), (C, K), (C, V), (K, V)]


def into_chunks(layout: Layout, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, normalize_qk: bool) -> Chunks:
    """Everything that can be computed without the states (``entering`` is left uninitialized)."""
    dtype, heads, K, V, C = state_dtype(q.dtype), v.shape[2], q.shape[-1], v.shape[-1], CHUNK
    Z = layout.chunks * heads

    def gather(x: Tensor, *rest: int) -> Tensor:
        return layout.gather(x, heads, q.new_empty(Z, C, *rest, dtype=dtype))

    qk = q.new_empty(Z, 2 * C, K, dtype=dtype)
    layout.gather(q, heads, qk[:, :C])
    k = layout.gather(k, heads, qk[:, C:])
    norms = qk.new_ones(Z, 2 * C, 1)
    if normalize_qk:
        torch.linalg.vecdot(qk, qk, out=norms.squeeze(-1))
        qk.mul_(norms.add_(L2_EPS).rsqrt_())
    v, beta = gather(v, V), gather(beta).unsqueeze(-1)
    # In float64, so that a gate of -1e-4 survives its sum with one of -1e4.
    gates = layout.gather(g, heads, q.new_empty(Z, C, dtype=torch.float64)).clamp_(min=LOWEST_GATE)
    total = gates.cumsum(-1).unsqueeze(-1)
    # Above the diagonal are non-negative exponents, which must not be exponentiated (nor be -inf: that exp is slow).
    decay = (total - total.mT).to(dtype).clamp_(max=0).exp_().tril_()
    into, out = total.to(dtype).exp(), (total[:, -1:] - total).to(dtype).exp()
    pairs = qk @ k.mT
    torch.unflatten(pairs, 1, (2, C)).mul_(decay.unsqueeze(1))
    recall = without_diagonal(pairs[:, C:])
    inverse = unit_inverse(recall * beta)
    w = inverse @ (k * (beta * into))
    u = inverse @ (v * beta)
    return Chunks(qk, norms, v, beta, decay, into, out, pairs, inverse, w, k * out, u, qk.new_empty(Z, K, V))


def unit_inverse(a: Tensor) -> Tensor:
    """(I + a)^-1 for strictly lower ``a`` [Z, n, n]: by halves, whose inverses and products are faster than one solve.

    It is as stable as forward substitution; a product of (I + a^(2^j)) is not, whose powers grow like binomials."""
    n = a.shape[-1]
    if n <= LEAF:
        identity = torch.eye(n, dtype=a.dtype, device=a.device).expand_as(a)
        leaf: Tensor = torch.linalg.solve_triangular(a, identity, upper=False, unitriangular=True)
        return leaf
    h = n // 2
    first, last = unit_inverse(torch.stack([a[:, :h, :h], a[:, h:, h:]]).flatten(0, 1)).chunk(2)
    inverse = torch.zeros_like(a)
    inverse[:, :h, :h], inverse[:, h:, h:] = first, last
    inverse[:, h:, :h] = (last @ a[:, h:, :h] @ first).neg_()
    return inverse


def row_dots(x: Tensor, y: Tensor, spent: Tensor) -> Tensor:
    """The products of the rows of x and y. Overwrites ``spent``: fresh memory costs more here than arithmetic."""
    dots: Tensor = torch.mul(x, y, out=spent).sum(-1)
    return dots


def without_diagonal(x: Tensor) -> Tensor:
    """``x`` [..., C, C] with its diagonal set to 0, in place."""
    x.diagonal(dim1=-2, dim2=-1).zero_()
    return x


def pad_to(x: Tensor, rows: int) -> Tensor:
    return x.contiguous() if x.shape[0] == rows else torch.cat([x, x.new_zeros(rows - x.shape[0], *x.shape[1:])])


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    normalize_qk: bool,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """See :meth:`widthwise.kernels.op.Backend.forward`. Saved are the fields of :class:`Chunks`."""
    (batch, time), heads = q.shape[:2], v.shape[2]
    layout = Layout.of(batch, time, cu_seqlens, q.device)
    c = into_chunks(layout, q, k, v, g, beta, normalize_qk)
    state = layout.states(initial_state, c.u, heads, q.shape[-1], v.shape[-1])
    # Views for every step are made by one call each: in this loop, calls cost as much as arithmetic.
    sizes = [(end - start) * heads for start, end in layout.steps]
    parts = (torch.split(x, sizes) for x in (c.entering, c.w, c.u, c.into[:, -1:], c.k_out.mT))
    for size, (entering, w, u, decay, k_out) in zip(sizes, zip(*parts, strict=True), strict=True):
        active = state[:size]
        entering.copy_(active)
        u.baddbmm_(w, entering, alpha=-1)
        active.mul_(decay).baddbmm_(k_out, u)
    o = torch.bmm(c.pairs[:, :CHUNK], c.u)
    o.baddbmm_(c.qk[:, :CHUNK] * c.into, c.entering, beta=scale, alpha=scale)
    bound = chunk_bound(q, cu_seqlens) * heads
    return layout.scatter(o, v), layout.unsort(state), tuple(pad_to(x, bound) for x in c)


def saved_like(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    normalize_qk: bool,
) -> tuple[Tensor, ...]:
    """See :meth:`widthwise.kernels.op.Backend.saved_like`."""
    rows, dtype = chunk_bound(q, cu_seqlens) * v.shape[2], state_dtype(q.dtype)
    return tuple(q.new_empty((rows, *shape), dtype=dtype) for shape in Chunks.shapes(q.shape[-1], v.shape[-1]))


def backward(
    do: Tensor,
    dfinal_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    normalize_qk: bool,
    saved: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """See :meth:`widthwise.kernels.op.Backend.backward`. ``dx`` is the gradient with respect to ``x`` throughout."""
    (batch, time), heads = q.shape[:2], v.shape[2]
    layout = Layout.of(batch, time, cu_seqlens, q.device)
    c = Chunks(*(x[: layout.chunks * heads] for x in saved))
    queries, keys = torch.split(c.qk, CHUNK, 1)
    do_dwrite = c.u.new_empty(c.u.shape[0], 2 * CHUNK, c.u.shape[-1])
    top, dwrite = torch.split(do_dwrite, CHUNK, 1)
    do = layout.gather(do, heads, top).mul_(scale)

    # The recurrence backward: dU = (what O asks of U) + D_C K dS', dS = (what O asks of S) + e_C dS' - W^T dU.
    du = c.pairs[:, :CHUNK].mT @ do
    asked = torch.bmm((queries * c.into).mT, do)
    dstate = layout.states(dfinal_state, c.u, heads, q.shape[-1], v.shape[-1])
    dleaving = torch.empty_like(asked)
    sizes = [(end - start) * heads for start, end in layout.steps]
    parts = (torch.split(x, sizes)[::-1] for x in (dleaving, du, asked, c.k_out, c.w.mT, c.into[:, -1:]))
    for size, (leaving, du_now, asked_now, k_out, w, decay) in zip(sizes[::-1], zip(*parts, strict=True), strict=True):
        active = dstate[:size]
        leaving.copy_(active)
        du_now.baddbmm_(k_out, leaving)
        torch.addcmul(asked_now, leaving, decay, out=active).baddbmm_(w, du_now, alpha=-1)

    # The writes, U = (I + A)^-1 beta (V - e K S), with dwrite of beta (V - e K S).
    dwrite.copy_(c.inverse.mT @ du)
    # Within the chunk: of Q K^T on top of what is, times -beta, that of K K^T. No gate touches the diagonals, so
    # gradients through the decays leave them out.
    cross = do_dwrite @ c.u.mT
    pairs, recalled = torch.split(cross * c.pairs, CHUNK, 1)
    torch.unflatten(cross, 1, (2, CHUNK)).mul_(c.decay.unsqueeze(1))
    without_diagonal(cross[:, CHUNK:].mul_(-c.beta))
    # Likewise through the entering state: of Q on top of what is, times beta, that of K.
    dqk = torch.bmm(do_dwrite, c.entering.mT).mul_(torch.cat([c.into, -c.into], 1))
    spent = torch.empty_like(dqk)
    asking, asked_k = torch.split(row_dots(c.qk, dqk, spent), CHUNK, 1)
    dk = dqk[:, CHUNK:].mul_(c.beta)
    dk_out = torch.bmm(c.u, dleaving.mT).mul_(c.out)
    left = row_dots(keys, dk_out, spent[:, :CHUNK])

    weight = c.beta.squeeze(-1)
    dbeta = row_dots(c.v, dwrite, du).add_(asked_k).sub_(recalled.sum(-1))
    passed = row_dots(c.entering, dleaving, asked).sum(-1, keepdim=True) * c.into[:, -1]
    crossing = without_diagonal(pairs.addcmul_(recalled, c.beta, value=-1))
    dg = gate_gradient(crossing, asking + asked_k * weight, left, passed)
    dqk.baddbmm_(cross, keys)
    dk.add_(dk_out.baddbmm_(cross.mT, c.qk))
    if normalize_qk:  # y = x r, r = (sum x^2 + eps)^(-1/2) has the gradient r (dy - y (y . dy))
        along = row_dots(c.qk, dqk, spent).unsqueeze(-1)
        dqk.addcmul_(c.qk, along, value=-1).mul_(c.norms)
    chunks = (dqk[:, :CHUNK], dk, dwrite.mul_(c.beta), dg, dbeta)
    dq, dk, dv, dg, dbeta = (layout.scatter(d, x) for d, x in zip(chunks, (q, k, v, g, beta), strict=True))
    return dq, dk, dv, dg, dbeta, None if initial_state is None else layout.unsort(dstate)


def gate_gradient(pairs: Tensor, entered: Tensor, left: Tensor, passed: Tensor) -> Tensor:
    """Gate t is crossed by every path from before t to t or later: within the chunk from j < t to i >= t (``pairs``
    [Z, C, C]), from the entering state to i >= t (``entered`` [Z, C]), from j < t to the leaving state (``left``
    [Z, C]), and from the one state to the other (``passed`` [Z, 1])."""
    before = torch.ones_like(pairs[0]).triu(1)  # [j, t]: j < t
    crossing = (pairs @ before).mul_(before.mT + torch.eye(CHUNK, dtype=pairs.dtype, device=pairs.device)).sum(-2)
    return crossing + entered.flip(-1).cumsum(-1).flip(-1) + left @ before + passed
