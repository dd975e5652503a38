"""The gated delta rule on the GPU: what ``op`` asks of a backend, by what an input wants first.

K and V that are no multiples of 8 are widened by zeros, which change nothing, since rows must come in steps of 16
bytes. bf16 goes to the kernels as it is, and normalized there. fp32, and fp16 that is to be normalized, go as fp16
with exact scales (``triton_half``).

dg and dbeta are one inner product a token and head, some near zero by chance. With operands rounded to bf16 a thousand
of them have an error of 0.003 together, but four of them more than 0.006 in one draw of ten. So where there are fewer
than FEW, they are summed in fp32 instead.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from widthwise.kernels import chunk_layout, chunked, triton_core, triton_half

FEW = 1024


def _operand(q: Tensor) -> torch.dtype:
    """What the matrix units multiply. Triton's interpreter has no bf16 dots, and its fp32 is exact."""
    if q.device.type == "cpu":
        return torch.float32 if q.dtype == torch.bfloat16 else q.dtype
    return torch.float16 if q.dtype == torch.float32 else q.dtype


def _is_halved(q: Tensor, normalize_qk: bool) -> bool:
    return (operand := _operand(q)) == torch.float16 and (normalize_qk or q.dtype != operand)


def _missing(*tensors: Tensor) -> bool:
    return any(x.shape[-1] % 8 for x in tensors)


def _wide(x: Tensor) -> Tensor:
    """Rows with zeros up to a multiple of 8."""
    return pad(x, (0, -x.shape[-1] % 8))


def _wide_state(x: Tensor | None) -> Tensor | None:
    return None if x is None else pad(x, (0, -x.shape[-1] % 8, 0, -x.shape[-2] % 8))


def _in_fp32(
    do: Tensor, dfinal_state: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float,
    initial_state: Tensor | None, normalize_qk: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(dg, dbeta) by the chunked path, which waits for the device unless all chunks are whole: so with tokens that do
    nothing at the ends."""
    length, more = q.shape[1], -q.shape[1] % chunk_layout.CHUNK
    q, k, v, do = (pad(x.float(), (0, 0, 0, 0, 0, more)) for x in (q, k, v, do))
    g, beta = (pad(x, (0, 0, 0, more)) for x in (g, beta))
    rest = (q, k, v, g, beta, scale, initial_state, None, normalize_qk)
    _, _, saved = chunked.forward(*rest)
    _, _, _, dg, dbeta, _ = chunked.backward(do, dfinal_state, *rest, saved)
    return dg[:, :length].contiguous(), dbeta[:, :length].contiguous()


def saved_like(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, normalize_qk: bool, keep: bool = True,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Uninitialized tensors like those that ``forward`` saves."""
    return triton_core.saved_like(_wide(q), _wide(v), cu_seqlens, _operand(q), keep)


def forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, normalize_qk: bool, keep: bool = True,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """o [B, T, HV, V] in q's dtype, final state [N, HV, K, V] fp32, and what ``backward`` needs of it."""
    key_dim, value_dim = q.shape[-1], v.shape[-1]
    if _missing(q, v):
        state = _wide_state(initial_state)
        rest = (g, beta, scale, state, cu_seqlens, normalize_qk, keep)
        o, final, saved = forward(_wide(q), _wide(k), _wide(v), *rest)
        return o[..., :value_dim].contiguous(), final[..., :key_dim, :value_dim].contiguous(), saved
    if _is_halved(q, normalize_qk):
        return triton_half.forward(q, k, v, g, beta, scale, initial_state, cu_seqlens, normalize_qk, keep)
    operand = _operand(q)
    o, final, saved = triton_core.forward(
        q.to(operand), k.to(operand), v.to(operand), g, beta, scale, initial_state, cu_seqlens, normalize_qk, keep=keep
    )
    return o.to(q.dtype), final, saved


def backward(
    do: Tensor, dfinal_state: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, normalize_qk: bool, saved: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """(dq, dk, dv, dg, dbeta, dinitial_state), each in the shape and dtype of its input."""
    key_dim, value_dim = q.shape[-1], v.shape[-1]
    if not triton_core.is_kept(saved):  # recorded where no gradient was asked for, as by an export
        saved = forward(q, k, v, g, beta, scale, initial_state, cu_seqlens, normalize_qk)[2]
    if _missing(q, v):
        dfinal, state = _wide_state(dfinal_state), _wide_state(initial_state)
        rest = (g, beta, scale, state, cu_seqlens, normalize_qk, saved)
        dq, dk, dv, dg, dbeta, dinitial = backward(_wide(do), dfinal, _wide(q), _wide(k), _wide(v), *rest)
        dq, dk, dv = (dx[..., :width].contiguous() for dx, width in ((dq, key_dim), (dk, key_dim), (dv, value_dim)))
        return dq, dk, dv, dg, dbeta, None if dinitial is None else dinitial[..., :key_dim, :value_dim].contiguous()
    rest = (g, beta, scale, initial_state, cu_seqlens, normalize_qk, saved)
    if _is_halved(q, normalize_qk):
        return triton_half.backward(do, dfinal_state, q, k, v, *rest)
    operand = _operand(q)
    dq, dk, dv, dg, dbeta, dinitial = triton_core.backward(
        do.to(operand), dfinal_state, q.to(operand), k.to(operand), v.to(operand), *rest
    )
    if operand == torch.bfloat16 and g.numel() < FEW and cu_seqlens is None:
        dg, dbeta = _in_fp32(do, dfinal_state, q, k, v, g, beta, scale, initial_state, normalize_qk)
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype), dg, dbeta, dinitial
