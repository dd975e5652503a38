"""Argument checks: a ValueError names the argument, what it is, and what is accepted.

Shapes, dtypes and devices are checked in every call. Values need the device to finish first, so:

- on the CPU, g <= 0 and ``cu_seqlens`` are checked in every call;
- on CUDA, a ``cu_seqlens`` tensor is checked when first seen (one wait per tensor, hence per batch, not per layer),
  and g in the first call of the process (passing the decay itself, or its negative, is wrong from the first call on).
  ``WIDTHWISE_CHECK=1`` checks g in every call there too. Nothing waits while a CUDA graph is being captured.
"""

import os
import weakref
from itertools import pairwise

import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
TRITON_MAX_KEY, TRITON_MAX_VALUE = 256, 512
TRITON_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def wrong(name: str, is_now: object, accepted: str) -> ValueError:
    """The error for argument ``name``. Only called once something is wrong: calls are checked at every step."""
    return ValueError(f"{name} is {is_now}; accepted: {accepted}")


def describe(x: object) -> str:
    return f"a tensor of shape {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def check_tokens(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> None:
    """Shapes, dtypes and devices of q, k [..., H, K], v [..., HV, V], g, beta [..., HV] with equal leading axes."""
    for name, x in (("q", q), ("k", k), ("v", v), ("g", g), ("beta", beta)):
        if not isinstance(x, Tensor):
            raise wrong(name, type(x).__name__, "a tensor")
        if x.dtype not in FLOATS:
            raise wrong(f"{name}.dtype", x.dtype, "bfloat16, float16, float32 or float64")
        if x.device != q.device:
            raise wrong(f"{name}.device", x.device, f"q's device, {q.device}")
    if k.shape != q.shape:
        raise wrong("k.shape", list(k.shape), f"q's shape, {list(q.shape)}")
    if q.shape[-2] == 0 or q.shape[-1] == 0:
        raise wrong("q.shape", list(q.shape), "at least one head and one key channel")
    if v.dim() != q.dim():
        raise wrong("v.shape", list(v.shape), f"as many axes as q {list(q.shape)}")
    if v.shape[:-2] != q.shape[:-2]:
        raise wrong("v.shape", list(v.shape), f"the leading axes of q {list(q.shape)}")
    if v.shape[-2] == 0 or v.shape[-1] == 0:
        raise wrong("v.shape", list(v.shape), "at least one head and one value channel")
    if v.shape[-2] % q.shape[-2] != 0:
        raise wrong("v.shape", list(v.shape), f"a number of heads that is a multiple of q's, {q.shape[-2]}")
    for name, x in (("g", g), ("beta", beta)):
        if x.shape != v.shape[:-1]:
            raise wrong(f"{name}.shape", list(x.shape), f"v's without its last axis, {list(v.shape)}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise wrong(f"{name}.dtype", x.dtype, f"q's dtype, {q.dtype}")


def check_state(name: str, state: Tensor, sequences: int, q: Tensor, v: Tensor) -> None:
    """A state must be [N, HV, K, V] on q's device, in fp32 (fp64 if q is)."""
    if not isinstance(state, Tensor):
        raise wrong(name, type(state).__name__, "a tensor")
    wanted = (sequences, v.shape[-2], q.shape[-1], v.shape[-1])
    if state.shape != wanted:
        raise wrong(f"{name}.shape", list(state.shape), f"[sequences, value heads, K, V] = {list(wanted)}")
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if state.dtype != dtype:
        raise wrong(f"{name}.dtype", state.dtype, f"{dtype} for q in {q.dtype}")
    if state.device != q.device:
        raise wrong(f"{name}.device", state.device, f"q's device, {q.device}")


def check_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """All that can be checked without looking at a value, hence while tracing too."""
    if not isinstance(q, Tensor) or q.dim() != 4:
        raise wrong("q", describe(q), "a tensor of shape [B, T, H, K]")
    check_tokens(q, k, v, g, beta)
    sequences = q.shape[0]
    if cu_seqlens is not None:
        if not isinstance(cu_seqlens, Tensor):
            raise wrong("cu_seqlens", type(cu_seqlens).__name__, "a tensor or None")
        if cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise wrong("cu_seqlens.dtype", cu_seqlens.dtype, "int32 or int64")
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
            raise wrong("cu_seqlens.shape", list(cu_seqlens.shape), "[N + 1] with N >= 1 sequences")
        if cu_seqlens.device != q.device:
            raise wrong("cu_seqlens.device", cu_seqlens.device, f"q's device, {q.device}")
        if q.shape[0] != 1:
            raise wrong("q.shape", list(q.shape), "B = 1 where cu_seqlens packs the sequences")
        sequences = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        check_state("initial_state", initial_state, sequences, q, v)


def check_triton(q: Tensor, v: Tensor) -> None:
    """What the Triton kernels do not take."""
    if q.dtype not in TRITON_FLOATS:
        raise wrong("q.dtype", q.dtype, "bfloat16, float16 or float32 in the Triton kernels")
    if q.shape[-1] > TRITON_MAX_KEY:
        raise wrong("q.shape", list(q.shape), f"K <= {TRITON_MAX_KEY} in the Triton kernels")
    if v.shape[-1] > TRITON_MAX_VALUE:
        raise wrong("v.shape", list(v.shape), f"V <= {TRITON_MAX_VALUE} in the Triton kernels")


def check_gates(g: Tensor) -> None:
    """g is the log of a decay: at most 0 (NaN passes, as it does everywhere else)."""
    if bool((g > 0).any()):
        raise wrong("max(g)", float(g[g > 0].max()), "g <= 0, the log of a decay in [0, 1]")


def check_cu_seqlens(cu_seqlens: Tensor, time: int) -> None:
    """Offsets must start at 0, never decrease, and end at T."""
    values = cu_seqlens.tolist()
    if values[0] != 0:
        raise wrong("cu_seqlens[0]", values[0], "0")
    for n, (start, end) in enumerate(pairwise(values)):
        if start > end:
            raise wrong(f"cu_seqlens[{n + 1}]", f"{end} after {start}", "offsets that never decrease")
    if values[-1] != time:
        raise wrong("cu_seqlens[-1]", values[-1], f"the number of tokens, {time}")


class ValueChecks:
    """The checks that look at values, and the memory of which of them have been made on CUDA."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[weakref.ref[Tensor], int, int]] = {}
        self.gates_seen = False

    def __call__(self, g: Tensor, cu_seqlens: Tensor | None, time: int) -> None:
        if g.device.type != "cuda":
            check_gates(g)
            if cu_seqlens is not None:
                check_cu_seqlens(cu_seqlens, time)
        elif not torch.cuda.is_current_stream_capturing():
            if not self.gates_seen or os.environ.get("WIDTHWISE_CHECK") == "1":
                check_gates(g)
                self.gates_seen = True
            if cu_seqlens is not None:
                self.once(cu_seqlens, time)

    def once(self, cu_seqlens: Tensor, time: int) -> None:
        """Check a tensor again only if it is another one, was written to, or goes with another T."""
        key = id(cu_seqlens)
        known = self.seen.get(key)
        if known is not None and known[0]() is cu_seqlens and known[1:] == (cu_seqlens._version, time):
            return
        check_cu_seqlens(cu_seqlens, time)
        ref = weakref.ref(cu_seqlens, lambda _: self.seen.pop(key, None))
        self.seen[key] = (ref, cu_seqlens._version, time)


check_values = ValueChecks()
