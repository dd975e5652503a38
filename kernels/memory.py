"""Memory of the CPU path that is kept and handed out again.

The C library gives large blocks back to the system when they are freed, and the system zeroes them page by page when
they are next asked for: at the sizes of a small model that costs as much as half of the arithmetic. GPU memory is
pooled by PyTorch for like reasons.
"""

import ctypes
import math
import threading
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

SMALL = 64 << 10  # bytes; the C library keeps what is smaller
KEPT = 256 << 20  # bytes that may lie idle

Lease = weakref.ref[ctypes.Array[ctypes.c_char]]


class Pool:
    """Blocks of memory. One comes back by itself when the last tensor that shares it is gone."""

    def __init__(self, kept: int = KEPT) -> None:
        self.kept = kept
        self.idle: dict[int, Tensor] = {}  # by address, the longest idle first
        self.idle_bytes = 0
        self.leased: dict[int, tuple[Lease, Tensor]] = {}  # by identity of the lease's reference
        # Tensors die in any thread, and at any point of this one.
        self.lock = threading.RLock()

    def empty(self, shape: Sequence[int], like: Tensor, dtype: torch.dtype) -> Tensor:
        """``torch.empty`` on the device of ``like``: contiguous, uninitialized."""
        size = math.prod(shape) * dtype.itemsize
        if like.device.type != "cpu" or size < SMALL:
            return torch.empty(shape, dtype=dtype, device=like.device)
        with self.lock:
            block = self.find(size)
            # What the tensor's storage holds on to, and lets go of when it dies.
            lease = (ctypes.c_char * size).from_address(block.data_ptr())
            watch = weakref.ref(lease, self.give_back)
            self.leased[id(watch)] = watch, block
        return torch.frombuffer(lease, dtype=dtype).view(shape)

    def find(self, size: int) -> Tensor:
        """The block that was last used, and so is likeliest in the cache, of those that fit without much waste."""
        for address, block in reversed(list(self.idle.items())):
            if size <= block.numel() <= 2 * size:
                self.idle_bytes -= block.numel()
                return self.idle.pop(address)
        return torch.empty(size, dtype=torch.uint8)

    def give_back(self, watch: Lease) -> None:
        with self.lock:
            _, block = self.leased.pop(id(watch))
            self.idle[block.data_ptr()] = block
            self.idle_bytes += block.numel()
            while self.idle_bytes > self.kept:
                self.idle_bytes -= self.idle.pop(next(iter(self.idle))).numel()


pool = Pool()
