"""How a launch is laid out: the chunks of the batch, and block sizes chosen from shape and chip, never by trial.

Everything a kernel is compiled for comes from the model (heads, widths, types, memory layout of a token) and the
chip; B, T and the number of sequences are plain arguments.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # an older Triton: pointers everywhere
    TensorDescriptor = None

CHUNK = 64
SHORTEST = 8  # chunks in a segment of a sequence that is walked in several places


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
    """``x`` [B, T, ...] as [B * T, ...] in a layout kernels read: rows contiguous, strides the same for any B and T,
    and where there are rows [B, T, heads, width], in the steps of 16 bytes that the copy engine takes.

    A view where there is one (a slice of a fused projection, say), else a copy.
    """
    flat = x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
    rows_apart = flat[0].numel() > 1 and any(s > flat.stride(0) or s <= 0 for s in flat.stride()[1:])
    if rows_apart or flat.stride(0) <= 0 or (x.dim() == 4 and not in_steps(flat)):
        flat = flat.contiguous()
    if flat.shape[0] == 1:  # the stride of a lone token is arbitrary
        flat = flat.as_strided(flat.shape, (flat[0].numel(), *flat.stride()[1:]))
    return flat


def in_steps(x: Tensor) -> bool:
    """Whether rows of ``x`` are contiguous and begin at multiples of 16 bytes."""
    steps = (x.data_ptr(), *(step * x.element_size() for step in x.stride()[:-1]))
    return x.stride(-1) == 1 and all(step % 16 == 0 for step in steps)


def describable(x: Tensor, cu_seqlens: Tensor | None) -> bool:
    """Whether tiles of ``x`` can come by the copy engine: where there is one, and no packed sequences, past whose ends
    it would read."""
    if TensorDescriptor is None or cu_seqlens is not None:
        return False
    return not x.is_cuda or torch.cuda.get_device_capability(x.device)[0] >= 9


def describe(x: Tensor, batch: Batch, block: int) -> TensorDescriptor:
    """A descriptor of ``x`` [B * T, heads, width] as [B, heads, T, width], for tiles of a chunk and ``block`` columns.

    What a tile has past the end of T or of the width is zero, so a sequence's tail never shows the next one.
    """
    token, head, _ = x.stride()
    shape = [batch.sequences, x.shape[1], batch.length, x.shape[2]]
    return TensorDescriptor(x, shape, [token * batch.length, head, token, 1], [1, 1, CHUNK, block])


def describe_matrices(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A descriptor of ``x`` [chunks, heads, M, N] as so many matrices, for tiles of ``rows`` by ``columns``."""
    return TensorDescriptor.from_tensor(x.view(-1, *x.shape[-2:]), [1, rows, columns])


def power_of_two(x: int) -> int:
    """The least block size that covers ``x``: a power of two, at least the 16 a dot needs."""
    return max(16, 1 << (x - 1).bit_length())


@dataclass(frozen=True)
class Chip:
    """What the choice of blocks asks of a chip."""

    processors: int
    roomy: bool  # with the shared memory of Hopper; others get smaller blocks, which no test has run on such a chip


def chip_of(x: Tensor) -> Chip:
    if not x.is_cuda:
        return Chip(132, True)
    properties = torch.cuda.get_device_properties(x.device)
    return Chip(properties.multi_processor_count, properties.major in (9, 10))


def most_joints(key_dim: int, value_dim: int, chip: Chip) -> int:
    """How many joints of segments, times heads, there can be on a chip, of any number of sequences of any length."""
    return chip.processors // -(-value_dim // 64) if key_dim <= 128 else 0


def segments_of(batch: Batch, heads: int, key_dim: int, value_dim: int, chip: Chip) -> tuple[int, int]:
    """(segments, chunks in each) that every sequence is walked in at once (``triton_split``).

    As many as keep the chip busy, where the second walk that this takes pays: from three on, and not in short ones.
    """
    chunks = -(-batch.length // CHUNK)
    walks = batch.sequences * heads
    segments = min(most_joints(key_dim, value_dim, chip) // walks, chunks // SHORTEST)
    if segments < 3 or batch.cu_seqlens is not None:
        return 1, batch.chunks
    span = -(-chunks // segments)
    return -(-chunks // span), span


def sweep_blocks(key_dim: int, value_dim: int, chip: Chip) -> dict[str, int]:
    """Blocks of the sequential walks: as many columns of V as one row of a warp group's matrix instruction, K in blocks
    of 64 where it would be padded or would not fit, and as many stages as fit the shared memory."""
    block_k = 64 if key_dim > 128 else power_of_two(key_dim)
    depth = 3 if chip.roomy and key_dim <= 192 else 2
    return {"BLOCK_K": block_k, "BLOCK_V": min(power_of_two(value_dim), 64), "DEPTH": depth, "num_warps": 4}


def states_depth(chip: Chip) -> int:
    """Stages of the walk that repeats states: its chunks are short, so their tiles must be asked for long before."""
    return 4 if chip.roomy else 2


def is_wide(key_dim: int, value_dim: int, chip: Chip) -> bool:
    """Whether the gradients take V in several blocks."""
    return value_dim > (128 if chip.roomy and key_dim > 64 else 64)


def gradient_blocks(key_dim: int, value_dim: int, chip: Chip) -> dict[str, int]:
    """Blocks of the chunk-parallel gradients where one block covers V: K in few blocks that pad little.

    Eight warps on the 64 rows of a chunk, four by two: the kernel keeps each dot's result from another's operands,
    or Triton would lay all of them along the rows. Heads of up to 64 channels leave eight too little to do.
    """
    if key_dim <= 64:
        return {"BLOCK_K": max(power_of_two(key_dim), 32), "BLOCK_V": 64, "num_warps": 4}
    block_k = 128 if chip.roomy and (key_dim <= 128 or key_dim > 192) else 64
    return {"BLOCK_K": block_k, "BLOCK_V": max(power_of_two(value_dim), 64), "num_warps": 8}


def wide_gradient_blocks(key_dim: int, chip: Chip) -> dict[str, int]:
    """Blocks where V takes several: of K such that the sums of all fit the registers of eight warps, [4, 2] on the 64
    rows of a chunk, in one pass up to 128 channels."""
    block_v = 64 if chip.roomy else 32
    block_k = 64 if key_dim <= 192 else 128
    return {
        "BLOCK_K": block_k, "BLOCK_V": block_v, "ONE_PASS": key_dim <= 128, "PAIRS_DEPTH": 4,
        "DEPTH": 3 if chip.roomy and key_dim <= 192 else 2, "num_warps": 8,
    }  # fmt: skip


def prepare_blocks(key_dim: int) -> dict[str, int]:
    """Blocks of the chunk-parallel preparation, with registers for four programs on a multiprocessor."""
    return {"BLOCK_K": min(power_of_two(key_dim), 64), "num_warps": 4, "maxnreg": 128}
