"""The public function, as one torch custom op: checks, dispatch to a backend, autograd, tracing.

A backend is a module with the three functions of :class:`Backend`. There are two: ``chunked`` (plain PyTorch) and
``triton_scan``; CUDA tensors go to the latter, and so do CPU tensors when ``TRITON_INTERPRET=1``.
"""

import os
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from widthwise.kernels import checks, chunked


class Backend(Protocol):
    """What the op asks of a backend.

    The op guarantees: shapes, dtypes and devices have passed ``checks``; B*T >= 1; q, k, v share one dtype, while g
    and beta may each be of another floating type; nothing is necessarily contiguous; ``cu_seqlens`` is int32 or
    int64 on q's device, starts at 0, never decreases (so empty sequences occur), and ends at T; autocast is off.
    N is the number of sequences: ``len(cu_seqlens) - 1``, or B without it.

    The backend returns fresh contiguous tensors: o [B, T, HV, V] in q's dtype; the final state [N, HV, K, V] in
    fp32 (fp64 if q is); gradients in the dtype and shape of their inputs. It never waits for the device.
    """

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        scale: float,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        normalize_qk: bool,
        keep: bool,
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """(o, final_state, saved): ``saved`` holds what ``backward`` would rather load than recompute, or, unless
        ``keep``, what of it is there anyway."""
        ...

    def backward(
        self,
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
        """(dq, dk, dv, dg, dbeta, dinitial_state); the last is None exactly when ``initial_state`` is."""
        ...

    def saved_like(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        scale: float,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        normalize_qk: bool,
        keep: bool,
    ) -> tuple[Tensor, ...]:
        """Uninitialized tensors of the shapes, strides and dtypes of ``saved``.

        It is called on fake tensors while torch.compile or torch.export trace, so it may look at shapes only, never
        at values: with ``cu_seqlens`` the number of chunks is not known, but T // chunk + N bounds it.
        """
        ...


def uses_triton(q: Tensor) -> bool:
    """Whether tensors like ``q`` go to Triton kernels: those on the GPU, and all in Triton's interpreter."""
    return q.device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def backend_for(q: Tensor) -> Backend:
    """The backend that computes for tensors like ``q``. Triton is imported here, at its first use, or never."""
    if uses_triton(q):
        from widthwise.kernels import triton_scan

        return cast(Backend, triton_scan)
    return cast(Backend, chunked)


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    normalize_qk: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The gated delta rule (Yang et al. 2024, arXiv:2412.06464, eq. 10) over whole sequences, differentiable once.

    Per sequence and value head, with S [K, V] starting from ``initial_state`` or 0, and x^T a transpose::

        S = exp(g_t) S;   u_t = beta_t (v_t - S^T k_t);   S = S + k_t u_t^T;   o_t = scale S^T q_t

    Args:
        q, k: [B, T, H, K] in bf16, fp16 or fp32 (and fp64 on the CPU).
        v: [B, T, HV, V] in q's dtype; HV a multiple of H, each q/k head serving HV/H consecutive value heads.
        g: [B, T, HV], any of these dtypes: the log of each token's decay, g <= 0 (-inf is allowed).
        beta: [B, T, HV], any of these dtypes: the writing strength, in [0, 1] where the state is to stay bounded.
        scale: of the output; None is K^(-1/2), as in FLA.
        initial_state: [N, HV, K, V] in fp32 (fp64 for fp64 inputs), N being B, or the number of packed sequences.
        output_final_state: also return the state after the last token.
        normalize_qk: divide q and k by their L2 norms over K, x * rsqrt(sum x^2 + 1e-6), inside the op.
        cu_seqlens: int32 or int64 [N + 1], for B = 1: sequence n is the tokens from cu_seqlens[n] to
            cu_seqlens[n + 1], which may be none.

    Returns:
        o [B, T, HV, V] in q's dtype, and the final state [N, HV, K, V] in fp32 (fp64 for fp64), or None.

    Raises:
        ValueError: naming the argument, what it is and what is accepted. When values (g, cu_seqlens) are looked at
            is said in :mod:`widthwise.kernels.checks`.
        RuntimeError: from a second differentiation.

    CPU inputs are computed with in fp32 (fp64 for fp64) whatever their dtype. On CUDA, fp32 inputs are multiplied as
    fp16 with exact scales, and summed in fp32 (:mod:`widthwise.kernels.triton_half` says within what range). Under
    autocast, q, k and v are cast to its dtype, while g, beta and the state keep theirs. The same inputs give the same
    bits; on CUDA, o where a gradient is wanted may differ from o where none is, within the type's rounding.
    """
    if isinstance(q, Tensor) and torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x if x.dtype == torch.float64 else x.to(dtype) for x in (q, k, v))
    checks.check_arguments(q, k, v, g, beta, initial_state, cu_seqlens)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    inputs = (q, k, v, g, beta, initial_state)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    o, final_state, _ = _forward_op(q, k, v, g, beta, scale, initial_state, cu_seqlens, normalize_qk, keep)
    return o, final_state if output_final_state else None


def sequences_of(q: Tensor, cu_seqlens: Tensor | None) -> int:
    return q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _final_state_like(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    shape = (sequences_of(q, cu_seqlens), v.shape[2], q.shape[3], v.shape[3])
    return q.new_empty(shape, dtype=chunked.state_dtype(q.dtype))


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("widthwise::gated_delta_rule", mutates_args=())
def _forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    normalize_qk: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    checks.check_values(g, cu_seqlens, q.shape[1])
    backend = backend_for(q)
    if backend is not chunked:
        checks.check_triton(q, v)
    args = (q, k, v, g, beta, scale, initial_state, cu_seqlens, normalize_qk, keep)
    if q.shape[0] * q.shape[1] == 0:  # no tokens: the state passes through
        final = _final_state_like(q, v, cu_seqlens).zero_()
        return _like(v), final if initial_state is None else final.copy_(initial_state), list(backend.saved_like(*args))
    with torch.autocast(q.device.type, enabled=False):
        o, final_state, saved = backend.forward(*args)
    return o, final_state, list(saved)


@_forward_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    normalize_qk: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    saved = backend_for(q).saved_like(q, k, v, g, beta, scale, initial_state, cu_seqlens, normalize_qk, keep)
    return _like(v), _final_state_like(q, v, cu_seqlens), list(saved)


@torch.library.custom_op("widthwise::gated_delta_rule_backward", mutates_args=())
def _backward_op(
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
    saved: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The last tensor is empty where there is no initial state: a schema has no optional results."""
    if q.shape[0] * q.shape[1] == 0:
        dstate = _dstate_like(q, initial_state).zero_()
        if initial_state is not None and dfinal_state is not None:
            dstate.copy_(dfinal_state)
        return _like(q), _like(k), _like(v), _like(g), _like(beta), dstate
    with torch.autocast(q.device.type, enabled=False):
        *grads, dinitial = backend_for(q).backward(
            do, dfinal_state, q, k, v, g, beta, scale, initial_state, cu_seqlens, normalize_qk, tuple(saved)
        )
    dq, dk, dv, dg, dbeta = grads
    return dq, dk, dv, dg, dbeta, _dstate_like(q, None) if dinitial is None else dinitial


def _dstate_like(q: Tensor, initial_state: Tensor | None) -> Tensor:
    return q.new_empty(0) if initial_state is None else _like(initial_state)


@_backward_op.register_fake
def _(
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
    saved: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _like(q), _like(k), _like(v), _like(g), _like(beta), _dstate_like(q, initial_state)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, list[Tensor]]) -> None:
    q, k, v, g, beta, ctx.scale, initial_state, cu_seqlens, ctx.normalize_qk, _ = inputs
    ctx.set_materialize_grads(False)  # a final state that nobody uses has no gradient, and costs nothing
    ctx.save_for_backward(q, k, v, g, beta, initial_state, cu_seqlens, *output[2])


def _backward(ctx: Any, do: Tensor | None, dfinal_state: Tensor | None, _: object) -> tuple[Tensor | None, ...]:
    q, k, v, g, beta, initial_state, cu_seqlens, *saved = ctx.saved_tensors
    do = _like(v).zero_() if do is None else do
    *grads, dinitial = _backward_op(
        do, dfinal_state, q, k, v, g, beta, ctx.scale, initial_state, cu_seqlens, ctx.normalize_qk, saved
    )
    return (*grads, None, None if initial_state is None else dinitial, None, None, None)


def _second_backward(ctx: Any, *grads: object) -> None:
    raise RuntimeError("gated_delta_rule can be differentiated once: its backward pass has no gradient of its own")


_forward_op.register_autograd(_backward, setup_context=_setup_context)
_backward_op.register_autograd(_second_backward)
