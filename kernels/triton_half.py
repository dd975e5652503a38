"""fp32 at the rate of 16 bit: the kernels' operands are fp16 with exact scales, their sums fp32.

fp16 has the 10 bits of mantissa of tf32, in which GPUs multiply fp32, and is rounded to where tf32 is cut off: the
results are nearer to exact ones by a factor of three. What it lacks is range. Normalized q and k need little. For the
rest the rule is linear in v and the initial state, in q, and in what flows back, so each of these is divided by a power
of two that brings its largest magnitude to between 2 and 4, which loses nothing, and the results are multiplied again.
A number 2^-16 of the largest of its tensor keeps 10 bits; below, it is rounded to 2^-26 of the largest. Above, there
is room for states 10^4 times as large as any input; one beyond makes the outputs infinite, never wrong. o and dq, which
may be nothing but a state that has decayed, are fp32 as they leave the kernels.

What flows back from the outputs and from the final state may differ by any factor, and is sent back one after the
other, each with its scale, and from chunk to chunk in units of what the gates have left of it (``walk_backwards``).
Where there is nothing but a final state's gradient, what lies behind gates that leave less than 2^-24 of it within one
chunk is still rounded away, and so it is segments away in a sequence that is walked in several places.

fp16 inputs go the same way, unscaled, where q and k are to be normalized: the reciprocal norm of a row that is near
zero has no room in fp16, so norms are divided out before.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from widthwise.kernels import triton_core

LARGEST = 2  # the exponent to which scales bring the largest magnitude
TINY = 2.0**-100  # least unit of a gradient


@dataclass(frozen=True)
class Halves:
    """The operands in fp16, and what each was divided by: numbers on the device, or None for 1."""

    q: Tensor
    k: Tensor
    v: Tensor
    initial: Tensor | None
    q_scale: Tensor | None
    k_scale: Tensor | None
    v_scale: Tensor | None


def scale_of(*tensors: Tensor | None) -> Tensor:
    """The power of two, fp32 [1], that the largest magnitude in ``tensors`` is to be divided by.

    Of one dimension, since a product of fp16 and a tensor of none would be computed in fp16.
    """
    most = torch.stack([torch.linalg.vector_norm(x, torch.inf, dtype=torch.float32) for x in tensors if x is not None])
    exponent = torch.frexp(most.amax(0, keepdim=True)).exponent.clamp(-100, 128) - LARGEST
    return ((exponent + 127) << 23).view(torch.float32)  # the bits of a power of two


def times(x: Tensor, *factors: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``x`` times numbers on the device in another type, in one pass."""
    known = [f for f in factors if f is not None]
    if not known:
        return x.to(dtype)
    factor = known[0]
    for another in known[1:]:
        factor = factor * another
    return torch.mul(x, factor, out=torch.empty_like(x, dtype=dtype))


def halve(q: Tensor, k: Tensor, v: Tensor, initial: Tensor | None, normalize_qk: bool) -> Halves:
    scaled = q.dtype != torch.float16
    q_scale, k_scale = (None if normalize_qk or not scaled else scale_of(x) for x in (q, k))
    v_scale = scale_of(v, initial) if scaled else None
    over = [None if scale is None else scale.reciprocal() for scale in (q_scale, k_scale, v_scale)]
    half = torch.float16
    return Halves(
        triton_core.normalized(q) if normalize_qk else times(q, over[0], dtype=half),
        triton_core.normalized(k) if normalize_qk else times(k, over[1], dtype=half),
        times(v, over[2], dtype=half),
        None if initial is None else times(initial, over[2], dtype=torch.float32),
        q_scale, k_scale, v_scale,
    )  # fmt: skip


def forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, normalize_qk: bool, keep: bool = True,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """As ``triton_scan.forward``."""
    x = halve(q, k, v, initial_state, normalize_qk)
    o, final, saved = triton_core.forward(
        x.q, x.k, x.v, g.float(), beta.float(), scale, x.initial, cu_seqlens, False,
        short_keys=normalize_qk, key_scale=x.k_scale, keep=keep, wide=q.dtype == torch.float32,
    )  # fmt: skip
    return times(o, x.q_scale, x.v_scale, dtype=q.dtype), times(final, x.v_scale, dtype=torch.float32), saved


def backward(
    do: Tensor, dfinal_state: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, normalize_qk: bool, saved: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """As ``triton_scan.backward``."""
    x = halve(q, k, v, initial_state, normalize_qk)

    def flow(
        do: Tensor, dfinal: Tensor | None, whole: Tensor | None, least: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """The gradients of what flows back; the loss is ``whole`` times the one that the kernels see."""
        dq_parts, dk_parts, dv, dg, dbeta, dinitial = triton_core.backward(
            do, dfinal, x.q, x.k, x.v, g.float(), beta.float(), scale, x.initial, cu_seqlens, False, saved,
            parts=q.dtype, least=least,
        )  # fmt: skip
        group = v.shape[2] // q.shape[2]
        dq, dk = (torch.empty(y.shape, dtype=y.dtype, device=y.device) for y in (q, k))
        for y, dy, parts, own in ((q, dq, dq_parts, x.q_scale), (k, dk, dk_parts, x.k_scale)):
            factor = whole if whole is None or own is None else whole / own
            triton_core.finish(y, parts, dy, group, normalize_qk, factor, unit=True)
        through_v = None if whole is None or x.v_scale is None else whole / x.v_scale
        return (
            dq, dk, times(dv, through_v, dtype=v.dtype),
            times(dg, whole, dtype=g.dtype), times(dbeta, whole, dtype=beta.dtype),
            None if dinitial is None else times(dinitial, through_v, dtype=torch.float32),
        )  # fmt: skip

    if x.v_scale is None:
        return flow(do, dfinal_state, None, 1.0)
    d_scale = scale_of(do)
    half_do = times(do, d_scale.reciprocal(), dtype=torch.float16)
    grads = flow(half_do, None, d_scale * x.v_scale if x.q_scale is None else d_scale * x.v_scale * x.q_scale, 1.0)
    if dfinal_state is not None:
        d_scale = scale_of(dfinal_state)
        more = flow(torch.zeros_like(half_do), dfinal_state / d_scale, d_scale * x.v_scale, TINY)
        for one, other in zip(grads, more, strict=True):
            if one is not None and other is not None:
                one += other
    return grads
