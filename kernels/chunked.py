"""The gated delta rule in chunks, in plain PyTorch: the backend for CPUs. Forward and a hand-written backward.

For one sequence and value head, within a chunk of C tokens entered with state S [K, V], let G be the running sum of g
from the chunk's start, e = exp(G), D_ij = exp(G_i - G_j) for i >= j (else 0), and write row scalings as products::

    A = beta * strictly_lower(K K^T * D)        what token i recalls of the writes of the tokens j before it
    U = (I + A)^-1 beta (V - e K S)             the writes themselves (the WY form: Yang et al. 2024, arXiv:2412.06464)
    O = e Q S + (Q K^T * D) U                   with scale folded into Q
    S' = e_C S + (D_C K)^T U                    D_C is D's last row

With W = (I + A)^-1 beta e K known, U - and so S' - is affine in S; that recurrence alone runs chunk by chunk, and
everything else is batched over chunks, heads and sequences.
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

    @staticmethod
    def of(batch: int, time: int, cu_seqlens: Tensor | None, device: torch.device) -> "Layout":
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

    def gather(self, x: Tensor, value_heads: int) -> Tensor:
        """[B, T, h, ...] -> [M*HV, C, ...]: a head is repeated for the value heads it serves, padding is 0."""
        heads = x.shape[2]
        served = torch.arange(value_heads, device=x.device) // (value_heads // heads)
        rows = self.tokens[:, None, :] * heads + served[:, None]  # [M, HV, C]
        chunks = x.reshape(-1, *x.shape[3:]).index_select(0, rows.flatten()).view(*rows.shape, *x.shape[3:])
        if self.padding is not None:
            chunks.masked_fill_(self.padding.view(rows.shape[0], 1, CHUNK, *[1] * (x.dim() - 3)), 0)
        return chunks.flatten(0, 1)

    def scatter(self, chunks: Tensor, like: Tensor) -> Tensor:
        """[M*HV, C, ...] -> the shape of ``like``, [B, T, h, ...]: summed over the value heads that a head serves."""
        batch, time, heads = like.shape[:3]
        value_heads = chunks.shape[0] // self.tokens.shape[0]
        places = self.places[:, None]
        head = torch.arange(value_heads, device=chunks.device)
        rows = (places // CHUNK * value_heads + head) * CHUNK + places % CHUNK  # [B*T, HV]
        x = chunks.flatten(0, 1).index_select(0, rows.flatten())
        x = x.view(batch, time, heads, value_heads // heads, *like.shape[3:])
        return x.squeeze(3) if heads == value_heads else x.sum(3)

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

    q: Tensor  # [Z, C, K], carrying the scale
    k: Tensor  # [Z, C, K]
    v: Tensor  # [Z, C, V]
    beta: Tensor  # [Z, C, 1]
    decay: Tensor  # [Z, C, C]  D
    into: Tensor  # [Z, C, 1]   e: from the chunk's start through token i
    out: Tensor  # [Z, C, 1]    D_C: from after token i to the chunk's end
    recall: Tensor  # [Z, C, C] strictly_lower(K K^T * D): A without beta
    read: Tensor  # [Z, C, C]   Q K^T * D
    inverse: Tensor  # [Z, C, C] (I + A)^-1
    w: Tensor  # [Z, C, K]      (I + A)^-1 beta e K
    k_out: Tensor  # [Z, C, K]  D_C K
    u: Tensor  # [Z, C, V]      U; before the states are known, what it would be from S = 0
    entering: Tensor  # [Z, K, V] S

    @staticmethod
    def shapes(K: int, V: int) -> list[tuple[int, int]]:
        C = CHUNK
        return [(C, K), (C, K), (C, V), (C, 1), (C, C), *[(C, 1)] * 2, *[(C, C)] * 3, *[(C, K)] * 2, (C, V), (K, V)]


def inverse_norms(x: Tensor) -> Tensor:
    squares: Tensor = torch.linalg.vecdot(x, x)
    return squares.add_(L2_EPS).rsqrt_().unsqueeze(-1)


def without_diagonal(x: Tensor) -> Tensor:
    """``x`` [..., C, C] with its diagonal set to 0, in place."""
    x.diagonal(dim1=-2, dim2=-1).zero_()
    return x


def into_chunks(
    layout: Layout, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, normalize_qk: bool
) -> Chunks:
    """Everything that can be computed without the states (``entering`` is left uninitialized)."""
    dtype, heads = state_dtype(q.dtype), v.shape[2]
    q, k = q.to(dtype), k.to(dtype)
    q = q * (inverse_norms(q) * scale if normalize_qk else scale)
    k = k * inverse_norms(k) if normalize_qk else k
    q, k, v, beta = (layout.gather(x.to(dtype), heads) for x in (q, k, v, beta))
    beta = beta.unsqueeze(-1)
    # In float64, so that a gate of -1e-4 survives its sum with one of -1e4.
    total = layout.gather(g.to(torch.float64).clamp(min=LOWEST_GATE), heads).cumsum(-1).unsqueeze(-1)
    upper = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).triu(1)
    decay = (total - total.mT).to(dtype).masked_fill_(upper, -torch.inf).exp_()
    into, out = total.to(dtype).exp(), (total[:, -1:] - total).to(dtype).exp()
    recall = without_diagonal((k @ k.mT).mul_(decay))
    read = (q @ k.mT).mul_(decay)
    identity = torch.eye(CHUNK, dtype=dtype, device=q.device).expand_as(recall)
    inverse = torch.linalg.solve_triangular(recall * beta, identity, upper=False, unitriangular=True).contiguous()
    w = inverse @ (k * (beta * into))
    u = inverse @ (v * beta)
    entering = q.new_empty(q.shape[0], q.shape[-1], v.shape[-1])
    return Chunks(q, k, v, beta, decay, into, out, recall, read, inverse, w, k * out, u, entering)


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
    c = into_chunks(layout, q, k, v, g, beta, scale, normalize_qk)
    state = layout.states(initial_state, c.q, heads, q.shape[-1], v.shape[-1])
    for start, end in layout.steps:
        now, active = slice(start * heads, end * heads), slice((end - start) * heads)
        c.entering[now] = state[active]
        c.u[now].baddbmm_(c.w[now], state[active], alpha=-1)
        state[active].mul_(c.into[now, -1:]).baddbmm_(c.k_out[now].mT, c.u[now])
    o = torch.bmm(c.read, c.u).baddbmm_(c.q * c.into, c.entering)
    bound = chunk_bound(q, cu_seqlens) * heads
    return layout.scatter(o, v).to(q.dtype), layout.unsort(state), tuple(pad_to(x, bound) for x in c)


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
    c = Chunks(*(x[: layout.tokens.shape[0] * heads] for x in saved))
    do = layout.gather(do.to(c.q.dtype), heads)

    # The recurrence backward: dU = (what O asks of U) + D_C K dS', dS = (what O asks of S) + e_C dS' - W^T dU.
    du = c.read.mT @ do
    asked = torch.bmm((c.q * c.into).mT, do)
    dstate = layout.states(dfinal_state, c.q, heads, q.shape[-1], v.shape[-1])
    dleaving = torch.empty_like(asked)
    for start, end in reversed(layout.steps):
        now, active = slice(start * heads, end * heads), slice((end - start) * heads)
        dleaving[now] = dstate[active]
        du[now].baddbmm_(c.k_out[now], dstate[active])
        dstate[active].mul_(c.into[now, -1:]).add_(asked[now]).baddbmm_(c.w[now].mT, du[now], alpha=-1)

    # The writes: U = (I + A)^-1 beta Y with Y = V - e K S.
    y = torch.baddbmm(c.v, c.k * c.into, c.entering, alpha=-1)
    dwrite = c.inverse.mT @ du  # of beta Y
    drecall = torch.bmm(dwrite, c.u.mT).neg_()
    dbeta = y.mul_(dwrite).sum(-1)
    dv = dwrite.mul_(c.beta)

    # Within the chunk. No gate touches the diagonals, so gradients through the decays leave them out.
    pairs = drecall * c.recall
    dbeta += pairs.sum(-1)
    dread = do @ c.u.mT
    pairs.mul_(c.beta).addcmul_(dread, c.read)
    dread.mul_(c.decay)
    drecall = without_diagonal(drecall.mul_(c.decay).mul_(c.beta))
    dq = torch.bmm(do, c.entering.mT).mul_(c.into)
    dk_in = torch.bmm(dv, c.entering.mT).mul_(-c.into)
    dk_out = torch.bmm(c.u, dleaving.mT).mul_(c.out)
    left = torch.linalg.vecdot(c.k, dk_out)
    entered = torch.linalg.vecdot(c.k, dk_in) + torch.linalg.vecdot(c.q, dq)
    passed = torch.linalg.vecdot(c.entering.flatten(1), dleaving.flatten(1))[:, None] * c.into[:, -1]
    dg = gate_gradient(without_diagonal(pairs), entered, left, passed)
    dq.baddbmm_(dread, c.k)
    dk = dk_in.add_(dk_out).baddbmm_(dread.mT, c.q).baddbmm_(drecall + drecall.mT, c.k)

    dq, dk = layout.scatter(dq, q).mul_(scale), layout.scatter(dk, k)
    if normalize_qk:
        dq, dk = norm_gradient(q, dq), norm_gradient(k, dk)
    dv, dg, dbeta = layout.scatter(dv, v), layout.scatter(dg, g), layout.scatter(dbeta, beta)
    dq, dk, dv, dg, dbeta = (d.to(x.dtype) for d, x in ((dq, q), (dk, k), (dv, v), (dg, g), (dbeta, beta)))
    return dq, dk, dv, dg, dbeta, None if initial_state is None else layout.unsort(dstate)


def gate_gradient(pairs: Tensor, entered: Tensor, left: Tensor, passed: Tensor) -> Tensor:
    """Gate t is crossed by every path from before t to t or later: within the chunk from j < t to i >= t (``pairs``
    [Z, C, C]), from the entering state to i >= t (``entered`` [Z, C]), from j < t to the leaving state (``left``
    [Z, C]), and from the one state to the other (``passed`` [Z, 1])."""
    before = torch.ones_like(pairs[0]).triu(1)  # [j, t]: j < t
    crossing = (pairs @ before).mul_(before.mT + torch.eye(CHUNK, dtype=pairs.dtype, device=pairs.device)).sum(-2)
    return crossing + entered.flip(-1).cumsum(-1).flip(-1) + left @ before + passed


def norm_gradient(x: Tensor, dy: Tensor) -> Tensor:
    """The gradient through y = x r, r = (sum x^2 + eps)^(-1/2): r dy - r^3 x (x . dy). Overwrites dy."""
    x = x.to(dy.dtype)
    r = inverse_norms(x)
    along = torch.linalg.vecdot(x, dy).unsqueeze(-1).mul_(r**3)
    return dy.mul_(r).addcmul_(x, along, value=-1)
