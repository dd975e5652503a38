"""How a launch is laid out: the chunks of the batch, and block sizes chosen from shape and chip, never by trial.

Everything a kernel is compiled for comes from the model (heads, widths, types, memory layout of a token) and the
chip; B, T and the number of sequences are plain arguments. They do choose, coarsely, how V is cut in the sequential
walks: a model whose batches leave multiprocessors idle at one size and not at another meets up to three variants of
each walk, compiled once each.

Four warps everywhere: with eight, Triton 3.6 lays all of them along the 64 rows of a chunk where dots are chained,
which is twice the rows there are. And sixteen-bit walks always have two stages or more: with one, its code reads
outside shared memory.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 64


@dataclass(frozen=True)
class Batch:
    """Where the sequences and their chunks are. ``chunks`` bounds their number: the true one stays on the device."""

    tokens: int
    length: int
    sequences: int
    chunks: int
    cu_seqlens: Tensor | None
    chunk_offsets: Tensor | None
    chunk_sequence: Tensor | None

    @property
    def tables(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.cu_seqlens, self.chunk_offsets, self.chunk_sequence


def chunk_bound(batch: int, length: int, cu_seqlens: Tensor | None) -> int:
    """Chunks to make room for, from shapes alone."""
    if cu_seqlens is None:
        return batch * -(-length // CHUNK)
    return length // CHUNK + len(cu_seqlens) - 1


def lay_out(q: Tensor, cu_seqlens: Tensor | None) -> Batch:
    """The batch of ``q`` [B, T, H, K], without waiting for the device."""
    batch, length = q.shape[:2]
    chunks = chunk_bound(batch, length, cu_seqlens)
    if cu_seqlens is None:
        return Batch(batch * length, length, batch, chunks, None, None, None)
    counts = torch.div(cu_seqlens.diff() + (CHUNK - 1), CHUNK, rounding_mode="floor")
    ends = counts.cumsum(0)
    sequences = len(counts)
    every = torch.arange(chunks, device=q.device, dtype=ends.dtype)
    # Spare chunks go to the last sequence, past whose end they lie.
    chunk_sequence = torch.searchsorted(ends, every, right=True).clamp_(max=sequences - 1)
    return Batch(batch * length, length, sequences, chunks, cu_seqlens, ends - counts, chunk_sequence)


def by_token(x: Tensor) -> Tensor:
    """``x`` [B, T, ...] as [B * T, ...] in a layout kernels read: rows contiguous, strides the same for any B and T.

    A view where there is one (a slice of a fused projection, say), else a copy.
    """
    flat = x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
    rows_apart = flat[0].numel() > 1 and any(s > flat.stride(0) or s <= 0 for s in flat.stride()[1:])
    if (x.dim() == 4 and flat.stride(-1) != 1) or rows_apart or flat.stride(0) <= 0:
        flat = flat.contiguous()
    if flat.shape[0] == 1:  # the stride of a lone token is arbitrary
        flat = flat.as_strided(flat.shape, (flat[0].numel(), *flat.stride()[1:]))
    return flat


def power_of_two(x: int) -> int:
    """The least block size that covers ``x``: a power of two, at least the 16 a dot needs."""
    return max(16, 1 << (x - 1).bit_length())


def processors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 132


def sweep_blocks(walks: int, key_dim: int, value_dim: int, itemsize: int, sms: int) -> dict[str, int]:
    """Blocks of the sequential walks, of which there are ``walks``, each over all of V.

    A walk's time is its chain of dots, not their size: narrow blocks of V until every multiprocessor has a program,
    wider ones beyond. Three stages hide most latency, two leave room for a second program, which hides more.
    """
    block_k = power_of_two(key_dim)
    if itemsize == 4:  # two stages do not fit
        block_v = min(power_of_two(value_dim), 32 if block_k <= 128 else 16)
        return {"BLOCK_K": block_k, "BLOCK_V": block_v, "DEPTH": 2 if block_k <= 64 else 1, "num_warps": 4}
    widest = min(power_of_two(value_dim), 64 if block_k != 128 else 32)
    block_v = 16
    while block_v < widest and walks * -(-value_dim // block_v) > sms:
        block_v *= 2
    alone = walks * -(-value_dim // block_v) <= sms
    return {"BLOCK_K": block_k, "BLOCK_V": block_v, "DEPTH": 3 if alone and block_k <= 128 else 2, "num_warps": 4}


def gradient_blocks(key_dim: int, value_dim: int, itemsize: int) -> dict[str, int]:
    """Blocks of the chunk-parallel gradients."""
    block_v = min(power_of_two(value_dim), 64 if itemsize == 2 else 32)
    # Never less than 64: with 32, Triton 3.6 gave wrong dk in 16 bit.
    return {"BLOCK_K": 64, "BLOCK_V": max(block_v, 32), "DEPTH": 2, "num_warps": 4}


def prepare_blocks(key_dim: int) -> dict[str, int]:
    """Blocks of the chunk-parallel preparation."""
    return {"BLOCK_K": min(power_of_two(key_dim), 128), "num_warps": 4}
