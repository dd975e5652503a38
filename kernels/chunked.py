"""The gated delta rule in chunks, in plain PyTorch: the backend for CPUs. Forward and a hand-written backward.

For one sequence and value head, within a chunk of C tokens entered with state S [K, V], let G be the running sum of g
from the chunk's start, e = exp(G), D_ij = exp(G_i - G_j) for i >= j (else 0), and write row scalings as products::

    A = beta * strictly_lower(K K^T * D)        what token i recalls of the writes of the tokens j before it
    U = (I + A)^-1 beta (V - e K S)             the writes themselves (the WY form: Yang et al. 2024, arXiv:2412.06464)
    O = scale (e Q S + (Q K^T * D) U)
    S' = e_C S + (D_C K)^T U                    D_C is D's last row

With W = (I + A)^-1 beta e K known, U - and so S' - is affine in S; that recurrence alone runs chunk by chunk, and
everything else is batched over chunks, heads and sequences. What q and k go through alike lies in one tensor [2, ...]:
Q and K, and dO and the gradient of beta (V - e K S).
Gradients that run through g only ever sum what they should and never take differences of prefix sums, so they keep
their relative accuracy however small the gates are.

Time goes into products and into memory: results are written where they belong (PyTorch's batched products are fast
only into contiguous tensors), and every tensor of size comes from a pool.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from widthwise.kernels.chunk_layout import CHUNK, Layout, chunk_bound
from widthwise.kernels.memory import pool
from widthwise.kernels.reference import L2_EPS

# exp(-1e4) is 0 in every dtype, so nothing is lost, and -inf becomes a number that can be subtracted.
LOWEST_GATE = -1e4


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """What states are held in, and what this backend computes in: fp32, or fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Chunks(NamedTuple):
    """Z = M*HV chunks. All of it is kept for the backward pass: on a CPU memory is cheaper than computing again."""

    qk: Tensor  # [2, Z, C, K]    Q and K
    norms: Tensor  # [2, Z, C, 1] what qk was multiplied by to be normalized
    v: Tensor  # [Z, C, V]
    beta: Tensor  # [Z, C, 1]
    decay: Tensor  # [Z, C, C]    D
    into: Tensor  # [Z, C, 1]     e: from the chunk's start through token i
    out: Tensor  # [Z, C, 1]      D_C: from after token i to the chunk's end
    pairs: Tensor  # [2, Z, C, C] Q K^T * D and strictly_lower(K K^T * D), which is A without beta
    inverse: Tensor  # [Z, C, C]  (I + A)^-1
    w: Tensor  # [Z, C, K]        (I + A)^-1 beta e K
    q_into: Tensor  # [Z, C, K]   e Q
    k_out: Tensor  # [Z, C, K]    D_C K
    u: Tensor  # [Z, C, V]        U; before the states are known, what it would be from S = 0
    entering: Tensor  # [Z, K, V] S

    @staticmethod
    def shapes(Z: int, K: int, V: int) -> list[tuple[int, ...]]:
        C, one = CHUNK, (Z, CHUNK, 1)
        tall = [(2, Z, C, K), (2, *one)]
        square, keys, values = (Z, C, C), (Z, C, K), (Z, C, V)
        return [*tall, values, one, square, one, one, (2, *square), square, keys, keys, keys, values, (Z, K, V)]

    @staticmethod
    def size(Z: int, K: int, V: int) -> int:
        return sum(math.prod(shape) for shape in Chunks.shapes(Z, K, V))

    @staticmethod
    def of(saved: Tensor, Z: int, K: int, V: int) -> "Chunks":
        """The views of one flat tensor, which may be longer."""
        shapes = Chunks.shapes(Z, K, V)
        parts = torch.split_with_sizes(saved[: Chunks.size(Z, K, V)], [math.prod(shape) for shape in shapes])
        return Chunks(*(part.view(shape) for part, shape in zip(parts, shapes, strict=True)))


def fill(c: Chunks, layout: Layout, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, normalize: bool) -> None:
    """Everything that can be computed without the states: all of ``c`` but ``entering``."""
    heads = v.shape[2]
    for x, into in ((q, c.qk[0]), (k, c.qk[1]), (v, c.v), (beta, c.beta.squeeze(-1))):
        layout.gather(x, heads, into)
    if normalize:
        torch.linalg.vector_norm(c.qk, dim=-1, keepdim=True, out=c.norms)
        c.qk.mul_(c.norms.square_().add_(L2_EPS).rsqrt_())
    else:
        c.norms.fill_(1)
    keys = c.qk[1]
    # In float64, so that a gate of -1e-4 survives its sum with one of -1e4; then in two parts of the working type.
    gates = layout.gather(g, heads, c.v.new_empty(c.v.shape[:2], dtype=torch.float64)).clamp_(min=LOWEST_GATE)
    total = gates.cumsum(-1).unsqueeze(-1)
    high = total.to(c.v.dtype)
    low = (total - high).to(c.v.dtype)
    # Above the diagonal are non-negative exponents, which must not be exponentiated (nor be -inf: that exp is slow).
    torch.sub(high, high.mT, out=c.decay).add_(low).sub_(low.mT).clamp_(max=0).exp_().tril_()
    torch.exp(high, out=c.into)
    c.out.copy_(total[:, -1:] - total).exp_()
    for x, pairs in zip(c.qk, c.pairs, strict=True):
        torch.bmm(x, keys.mT, out=pairs)
    recall = without_diagonal(c.pairs.mul_(c.decay)[1])
    writing = scratch(c.inverse)
    unit_inverse(torch.mul(recall, c.beta, out=writing), c.inverse)
    torch.mul(c.inverse, c.beta.mT, out=writing)
    torch.bmm(writing, torch.mul(keys, c.into, out=scratch(keys)), out=c.w)
    torch.bmm(writing, c.v, out=c.u)
    torch.mul(c.qk[0], c.into, out=c.q_into)
    torch.mul(keys, c.out, out=c.k_out)


def unit_inverse(a: Tensor, inverse: Tensor) -> None:
    """``inverse`` = (I + a)^-1 for strictly lower ``a`` [Z, C, C], by forward substitution; a product of (I + a^(2^j))
    is not as stable, whose powers grow like binomials. Turned, since LAPACK's columns are PyTorch's rows."""
    identity = torch.eye(CHUNK, dtype=a.dtype, device=a.device)
    torch.linalg.solve_triangular(a.mT, identity, upper=True, unitriangular=True, out=inverse.mT)


def scratch(like: Tensor) -> Tensor:
    """Memory to write to, in the shape of ``like``."""
    return pool.empty(like.shape, like, like.dtype)


def product(a: Tensor, b: Tensor, out: Tensor, scale: float) -> Tensor:
    """``out`` = scale a b, whatever ``out`` held."""
    return out.baddbmm_(a, b, beta=0, alpha=scale)


def row_sums(x: Tensor) -> Tensor:
    """The sum of every row of x, which is contiguous: as a product, quicker than a sum of so few numbers."""
    return torch.mv(x.view(-1, x.shape[-1]), x.new_ones(x.shape[-1])).view(x.shape[:-1])


def row_dots(x: Tensor, y: Tensor, spent: Tensor) -> Tensor:
    """The products of the rows of x and y. Overwrites ``spent``."""
    return row_sums(torch.mul(x, y, out=spent))


def without_diagonal(x: Tensor) -> Tensor:
    """``x`` [..., C, C] with its diagonal set to 0, in place."""
    x.diagonal(dim1=-2, dim2=-1).zero_()
    return x


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
    keep: bool = True,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """See :meth:`widthwise.kernels.op.Backend.forward`. Saved are :class:`Chunks`, in one tensor, which
    the output is computed from: ``keep`` changes nothing."""
    (batch, time), heads, K, V = q.shape[:2], v.shape[2], q.shape[-1], v.shape[-1]
    layout, dtype = Layout.of(batch, time, cu_seqlens, q.device), state_dtype(q.dtype)
    Z = layout.chunks * heads
    saved = pool.empty([Chunks.size(chunk_bound(q, cu_seqlens) * heads, K, V)], q, dtype)
    saved[Chunks.size(Z, K, V) :].zero_()  # spare chunks, which nothing reads
    c = Chunks.of(saved, Z, K, V)
    fill(c, layout, q, k, v, g, beta, normalize_qk)
    state = layout.states(initial_state, c.u, heads, K, V)
    walk(layout, heads, c, state)
    o = torch.bmm(c.pairs[0], c.u, out=scratch(c.u))
    o.baddbmm_(c.q_into, c.entering, beta=scale, alpha=scale)
    return layout.scatter(o, v), layout.unsort(state, heads), (saved,)


def walk(layout: Layout, heads: int, c: Chunks, state: Tensor) -> None:
    """The recurrence: fills ``c.entering``, completes ``c.u``, and takes ``state`` from the initial to the final ones.

    What leaves a chunk is computed where it enters the next, or where it ends. Views for every step are made by one
    call each: in this loop, calls cost as much as arithmetic."""
    sizes = [(end - start) * heads for start, end in layout.steps]
    views = [torch.split_with_sizes(x, sizes) for x in (c.entering, c.w, c.u, c.into[:, -1:], c.k_out.mT)]
    places, more = [*views[0][1:], state[:0]], [*sizes[1:], 0]
    views[0][0].copy_(state[: sizes[0]])
    for size, on, place, now, w, u, decay, k_out in zip(sizes, more, places, *views, strict=True):
        u.baddbmm_(w, now, alpha=-1)
        if on == size:
            torch.mul(now, decay, out=place).baddbmm_(k_out, u)
            continue
        for some, where in ((slice(on), place), (slice(on, size), state[on:size])):
            torch.mul(now[some], decay[some], out=where).baddbmm_(k_out[some], u[some])


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
    keep: bool = True,
) -> tuple[Tensor, ...]:
    """See :meth:`widthwise.kernels.op.Backend.saved_like`."""
    Z = chunk_bound(q, cu_seqlens) * v.shape[2]
    return (q.new_empty(Chunks.size(Z, q.shape[-1], v.shape[-1]), dtype=state_dtype(q.dtype)),)


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
    (batch, time), heads, K, V = q.shape[:2], v.shape[2], q.shape[-1], v.shape[-1]
    layout = Layout.of(batch, time, cu_seqlens, q.device)
    c = Chunks.of(saved[0], layout.chunks * heads, K, V)
    queries, keys = c.qk
    do_dwrite = pool.empty((2, *c.u.shape), c.u, c.u.dtype)
    layout.gather(do, heads, do_dwrite[0])
    dstate = layout.states(dfinal_state, c.u, heads, K, V)
    du, dleaving, spent_state = walk_back(layout, heads, c, do_dwrite[0], dstate, scale)

    # The writes, U = (I + A)^-1 beta (V - e K S), with dwrite of beta (V - e K S).
    dwrite = torch.bmm(c.inverse.mT, du, out=do_dwrite[1])
    # Within the chunk: of Q K^T, and times -beta, that of K K^T; through the entering state: of Q, and that of K.
    cross, dqk = scratch(c.pairs), scratch(c.qk)
    for x, through_pairs, through_state, factor in zip(do_dwrite, cross, dqk, (scale, 1.0), strict=True):
        product(x, c.u.mT, through_pairs, factor)
        product(x, c.entering.mT, through_state, factor)
    # No gate touches the diagonals, so gradients through the decays leave them out.
    pairs, recalled = torch.mul(cross, c.pairs, out=scratch(cross))
    without_diagonal(cross.mul_(c.decay)[1].mul_(-c.beta))
    spent, into, weight = scratch(dqk), c.into.squeeze(-1), c.beta.squeeze(-1)
    asking, asked_k = row_dots(c.qk, dqk, spent).mul_(into)
    dqk.mul_(torch.stack([c.into, -c.into * c.beta]))
    dk_out = torch.bmm(c.u, dleaving.mT, out=scratch(keys))
    left = row_dots(c.k_out, dk_out, spent[0])

    dbeta = row_dots(c.v, dwrite, du).sub_(asked_k).sub_(row_sums(recalled))
    passed = row_dots(*(x.flatten(1) for x in (c.entering, dleaving, spent_state))).unsqueeze(-1) * into[:, -1:]
    crossing = without_diagonal(pairs.addcmul_(recalled, c.beta, value=-1))
    dg = gate_gradient(crossing, asking.addcmul_(asked_k, weight, value=-1), left, passed, recalled)
    dq, dk = dqk
    dq.baddbmm_(cross[0], keys)
    dk.baddbmm_(cross[1], keys).baddbmm_(cross[0].mT, queries).baddbmm_(cross[1].mT, keys).addcmul_(dk_out, c.out)
    if normalize_qk:  # y = x r, r = (sum x^2 + eps)^(-1/2) has the gradient r (dy - y (y . dy))
        dqk.addcmul_(c.qk, row_dots(c.qk, dqk, spent).unsqueeze(-1), value=-1)
    unit_q, unit_k = c.norms if normalize_qk else (None, None)
    return (
        layout.scatter(dq, q, unit_q),
        layout.scatter(dk, k, unit_k),
        layout.scatter(dwrite, v, c.beta),
        layout.scatter(dg, g),
        layout.scatter(dbeta, beta),
        None if initial_state is None else layout.unsort(dstate, heads),
    )


def walk_back(
    layout: Layout, heads: int, c: Chunks, do: Tensor, dstate: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The recurrence backward: dU = (what O asks of U) + D_C K dS', dS = (what O asks of S) + e_C dS' - W^T dU.

    Returns dU [Z, C, V], dS' [Z, K, V] and spent memory of that size, and takes ``dstate`` from the final to the
    initial states' gradient. What enters a chunk is computed where it leaves the one before."""
    du = product(c.pairs[0].mT, do, scratch(c.u), scale)
    asked = product(c.q_into.mT, do, scratch(c.entering), scale)
    dleaving = scratch(c.entering)
    sizes = [(end - start) * heads for start, end in layout.steps]
    views = [torch.split_with_sizes(x, sizes) for x in (dleaving, du, asked, c.k_out, c.w.mT, c.into[:, -1:])]
    places, more = [dstate[: sizes[0]], *views[0][:-1]], [sizes[0], *sizes[:-1]]
    views[0][-1].copy_(dstate[: sizes[-1]])
    steps = list(zip(sizes, more, places, *views, strict=True))
    for size, then, place, leaving, du_now, asked_now, k_out, w, decay in reversed(steps):
        du_now.baddbmm_(k_out, leaving)
        if then > size:  # sequences that end there
            place[size:].copy_(dstate[size:then])
            place = place[:size]
        torch.addcmul(asked_now, leaving, decay, out=place).baddbmm_(w, du_now, alpha=-1)
    return du, dleaving, asked


def gate_gradient(pairs: Tensor, entered: Tensor, left: Tensor, passed: Tensor, spent: Tensor) -> Tensor:
    """Gate t is crossed by every path from before t to t or later: within the chunk from j < t to i >= t (``pairs``
    [Z, C, C]), from the entering state to i >= t (``entered`` [Z, C]), from j < t to the leaving state (``left``
    [Z, C]), and from the one state to the other (``passed`` [Z, 1]). Overwrites ``spent``."""
    before = torch.ones_like(pairs[0]).triu(1)  # [j, t]: j < t
    crossing = torch.matmul(pairs, before, out=spent).mul_(torch.ones_like(before).tril()).sum(-2)
    return crossing.addmm_(left, before).add_(entered.flip(-1).cumsum(-1).flip(-1)).add_(passed)
