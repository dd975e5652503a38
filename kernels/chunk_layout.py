"""Which token sits in which row of which chunk, for the path in plain PyTorch: sequences in, chunks out, and back."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from widthwise.kernels.memory import pool

CHUNK = 32


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

    sequences: int  # N
    order: Tensor | None  # [N] sequences, longest first; None where that is as they come
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
            return Layout(batch, None, steps, none, None, none, (depth, batch))
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
        return Layout(len(order), order, steps, tokens, None if bool(valid.all()) else ~valid, places)

    @property
    def chunks(self) -> int:
        return self.steps[-1][1]

    def gather(self, x: Tensor, value_heads: int, into: Tensor) -> Tensor:
        """[B, T, h, ...] -> ``into`` [M*HV, C, ...]: a head is repeated for the value heads it serves, padding is 0."""
        heads, rest = x.shape[2], x.shape[3:]
        groups = value_heads // heads
        if self.grid is not None:
            torch.unflatten(into, 0, (*self.grid, heads, groups)).copy_(self.by_chunk(x))
            return into
        served = torch.arange(value_heads, device=x.device) // groups
        index = self.tokens[:, None, :] * heads + served[:, None]  # [M, HV, C]
        into.copy_(x.reshape(-1, *rest).index_select(0, index.flatten()).view(-1, CHUNK, *rest))
        if self.padding is not None:
            into.masked_fill_(self.padding.repeat_interleave(value_heads, 0).view(-1, CHUNK, *[1] * len(rest)), 0)
        return into

    def scatter(self, chunks: Tensor, like: Tensor, times: Tensor | None = None) -> Tensor:
        """[M*HV, C, ...] -> the shape and dtype of ``like``, [B, T, h, ...]: summed over the value heads that a head
        serves. What is scattered is ``chunks * times``, where that is given; ``chunks`` may be overwritten."""
        batch, time, heads = like.shape[:3]
        value_heads = chunks.shape[0] // self.chunks
        groups, rest = value_heads // heads, like.shape[3:]
        scattered = pool.empty(like.shape, like, like.dtype)
        if self.grid is not None:
            place = self.by_chunk(scattered)
            x = torch.unflatten(chunks, 0, (*self.grid, heads, groups))
            factor = None if times is None else torch.unflatten(times, 0, (*self.grid, heads, groups))
            if groups > 1:
                place.copy_((x if factor is None else x.mul_(factor)).sum(3, keepdim=True))
            elif factor is None or like.dtype != chunks.dtype:
                place.copy_(x if factor is None else x.mul_(factor))
            else:
                torch.mul(x, factor, out=place)
            return scattered
        chunks = chunks if times is None else chunks.mul_(times)
        places = self.places[:, None]
        head = torch.arange(value_heads, device=chunks.device)
        rows = (places // CHUNK * value_heads + head) * CHUNK + places % CHUNK  # [B*T, HV]
        x = chunks.reshape(-1, *rest).index_select(0, rows.flatten()).view(batch, time, heads, groups, *rest)
        return scattered.copy_(x.squeeze(3) if groups == 1 else x.sum(3))

    def by_chunk(self, x: Tensor) -> Tensor:
        """[B, T, h, ...] as a view [depth, B, h, 1, C, ...] of whole chunks."""
        assert self.grid is not None
        return torch.unflatten(x, 1, (self.grid[0], CHUNK)).permute(1, 0, 3, 2, *range(4, x.dim() + 1)).unsqueeze(3)

    def states(self, given: Tensor | None, like: Tensor, heads: int, K: int, V: int) -> Tensor:
        """[N, HV, K, V], or zeros, -> [N*HV, K, V] in the order of the recurrence; always a fresh tensor."""
        if given is None:
            return like.new_zeros(self.sequences * heads, K, V)
        ordered = given.clone() if self.order is None else given.index_select(0, self.order)
        return ordered.to(like.dtype).reshape(-1, K, V)

    def unsort(self, states: Tensor, heads: int) -> Tensor:
        """The reverse of :meth:`states`."""
        states = states.view(-1, heads, *states.shape[1:])
        return states if self.order is None else states.index_select(0, self.order.argsort())
