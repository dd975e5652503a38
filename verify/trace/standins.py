"""What is not to be traced into: functions that stand in for kernels, in ops that have rules.

A stand-in computes shapes and dataflow, never values, so it may be written in any torch code that this package
understands, and in the leaf ops below. Five lines register one::

    @stand_in("my_kernels.ops:fused_gate")
    def fused_gate(x, y):
        return torch.sigmoid(x) * y

Every module that holds the named function (a copy imported by name too) gets the stand-in while a model is exported.
``my_kernels.*`` names all modules below a package. For a class, ``my_kernels.moe:*Experts.forward``.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])
STAND_INS: dict[str, Callable[..., Any]] = {}


def stand_in(*names: str) -> Callable[[Function], Function]:
    """Register a function for ``module:function`` or ``module:Class.method`` globs."""

    def register(function: Function) -> Function:
        STAND_INS.update(dict.fromkeys(names, function))
        return function

    return register


@contextlib.contextmanager
def standing_in() -> Iterator[None]:
    """Put the stand-ins in place, and take them away again."""
    undo: list[tuple[Any, str, Any]] = []
    functions: dict[int, Callable[..., Any]] = {}
    modules = [(name, module) for name, module in list(sys.modules.items()) if isinstance(module, ModuleType)]
    try:
        for glob, function in STAND_INS.items():
            module_glob, _, path = glob.partition(":")
            owner_glob, _, attribute = path.rpartition(".")
            for name, module in modules:
                for owner in _owners(module, owner_glob) if fnmatchcase(name, module_glob) else ():
                    if attribute in vars(owner) and vars(owner)[attribute] is not function:
                        undo.append((owner, attribute, vars(owner)[attribute]))
                        setattr(owner, attribute, function)
                        if owner is module:
                            functions[id(undo[-1][2])] = function
        for _, module in modules:  # whoever imported one of them by name
            for attribute, value in list(vars(module).items()):
                if id(value) in functions:
                    undo.append((module, attribute, value))
                    setattr(module, attribute, functions[id(value)])
        yield
    finally:
        for owner, attribute, old in reversed(undo):
            setattr(owner, attribute, old)


def _owners(module: Any, glob: str) -> Iterator[Any]:
    if not glob:
        yield module
        return
    for name, value in list(vars(module).items()):
        if isinstance(value, type) and fnmatchcase(name, glob):
            yield value


# -- leaf ops: what a stand-in may call where torch has no op of that meaning ------------------------------------------


@torch.library.custom_op("widthwise_trace::scan", mutates_args=())
def _scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    scale: float | None,
    normalize: bool,
    erase: bool,
) -> Tensor:
    raise NotImplementedError("a leaf of the tracer has no values")


@_scan.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    scale: float | None,
    normalize: bool,
    erase: bool,
) -> Tensor:
    return torch.empty_like(v)


@torch.library.custom_op("widthwise_trace::rotate", mutates_args=())
def _rotate(x: Tensor) -> Tensor:
    raise NotImplementedError("a leaf of the tracer has no values")


@_rotate.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("widthwise_trace::expert_linear", mutates_args=())
def _expert_linear(x: Tensor, weight: Tensor) -> Tensor:
    raise NotImplementedError("a leaf of the tracer has no values")


@_expert_linear.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[1])


@torch.library.custom_op("widthwise_trace::mix", mutates_args=())
def _mix(x: Tensor, weights: Tensor) -> Tensor:
    raise NotImplementedError("a leaf of the tracer has no values")


@_mix.register_fake
def _(x: Tensor, weights: Tensor) -> Tensor:
    return torch.empty_like(x)


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    normalize: bool = False,
    erase: bool = True,
) -> Tensor:
    """The gated delta rule and its kin on q, k ``[B, T, H, K]``, v ``[B, T, HV, V]``, log decay g and β ``[B, T, HV]``.

    ``scale`` None is K^(-1/2); ``normalize`` divides q and k by their lengths; without ``erase`` it is a plain
    linear attention with decay.
    """
    return _scan(q, k, v, g, beta, scale, normalize, erase)  # type: ignore[no-any-return]


def rotate(x: Tensor) -> Tensor:
    """Rotary position embedding: pairs of entries turned by an angle that depends on the position alone."""
    return _rotate(x)  # type: ignore[no-any-return]


def expert_linear(x: Tensor, weight: Tensor) -> Tensor:
    """W[e] x with the weight [experts, out, in] of whatever expert the token is routed to."""
    return _expert_linear(x, weight)  # type: ignore[no-any-return]


def mix(x: Tensor, weights: Tensor) -> Tensor:
    """Experts' outputs x [N, d] times routing weights [N, experts], summed over the experts a token is routed to."""
    return _mix(x, weights)  # type: ignore[no-any-return]
