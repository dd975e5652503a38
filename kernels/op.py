"""The public function, as one torch custom op: checks, dispatch to a backend, autograd, tracing.

A backend is a module with the three functions of :class:`Backend`. There are two: ``chunked`` (plain PyTorch) and
``triton_scan``; CUDA tensors go to the latter, and so do CPU tensors when ``TRITON_INTERPRET=1``.
"""

import os
from collections.abc import Sequence
from typing import Protocol

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
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """(o, final_state, saved): ``saved`` holds what ``backward`` would rather load than recompute."""
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
    ) -> tuple[Tensor, ...]:
        """Uninitialized tensors of the shapes, strides and dtypes of ``saved``.

        It is called on fake tensors while torch.compile or torch.export trace, so it may look at shapes only, never
        at values: with ``cu_seqlens`` the number of chunks is not known, but T // chunk + N bounds it.
        """
        ...
