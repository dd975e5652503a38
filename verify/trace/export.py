"""From a function that makes models to exported programs at several widths, on the meta device."""

from __future__ import annotations

import contextlib
import gc
import importlib
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from widthwise.derive.errors import DeriveError
from widthwise.verify.trace.sites import Site, aligned
from widthwise.verify.trace.standins import standing_in

MakeModel = Callable[[int], Any]


def imported(name: str) -> MakeModel:
    """``package.module:function``, importable from the current folder.

    Raises:
        DeriveError: when there is no such function.
    """
    module, separator, function = name.partition(":")
    sys.path.insert(0, "")
    try:
        found = getattr(importlib.import_module(module), function) if separator else None
    except Exception as error:  # whatever somebody else's module raises is theirs to read, not a traceback of ours
        raise DeriveError(
            f"{name} cannot be imported: {type(error).__name__}: {error}", cure="give package.module:function"
        ) from None
    finally:
        sys.path.remove("")
    if not callable(found):
        raise DeriveError(f"{name!r} names no function", cure="give package.module:function")
    return found  # type: ignore[no-any-return]


def exported(make: MakeModel, widths: Sequence[int]) -> tuple[list[Site], torch.nn.Module]:
    """One site for each call of the model, aligned over the widths, and the model at the first width.

    ``make(width)`` returns (module, example inputs); both are put on the meta device if they are not there.

    Raises:
        DeriveError: when fewer than two widths are given, a model cannot be made or exported, or the models differ.
    """
    if len(set(widths)) < 2 or min(widths) < 1:
        raise DeriveError(f"widths {list(widths)} tell no exponents", cure="give two or three different widths")
    modules, programs = [], []
    with _uncollected():
        for width in widths:
            module, example = _made(make, width)
            with standing_in():
                programs.append(_program(module, example, width))
            modules.append(module)
        return aligned(programs, modules), modules[0]


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Without the garbage collector, which would go through millions of live objects over and over."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _made(make: MakeModel, width: int) -> tuple[torch.nn.Module, tuple[Any, ...]]:
    try:
        with torch.device("meta"):
            made = make(width)
    except Exception as error:
        raise DeriveError(
            f"the model cannot be made at width {width} on the meta device: {type(error).__name__}: {error}",
            cure="construct it without reading values, and take every size from the width",
        ) from error
    if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[0], torch.nn.Module):
        raise DeriveError(
            f"the function returned {type(made).__name__}", cure="return (module, example inputs) for a width"
        )
    module, example = made
    inputs = tuple(example) if isinstance(example, tuple | list) else (example,)
    return module.to("meta"), tuple(each.to("meta") if isinstance(each, torch.Tensor) else each for each in inputs)


def _program(module: torch.nn.Module, example: tuple[Any, ...], width: int) -> torch.export.ExportedProgram:
    try:
        with warnings.catch_warnings(), torch.device("meta"):  # also for constants that the model makes on no device
            warnings.simplefilter("ignore")
            return torch.export.export(module, example, strict=False)
    except DeriveError:
        raise
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DeriveError(
            f"torch.export refuses the model at width {width}: {first}",
            where=_frame(error, module),
            cure="control flow may not depend on the values of tensors; make such a function a stand-in",
        ) from error


def _frame(error: BaseException, module: torch.nn.Module) -> str:
    """The line of the model's own code that raised, if it did."""
    found, trace = "", error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename.replace("\\", "/")
        if name.endswith(".py") and not any(f"/{each}/" in name for each in ("torch", "sympy", "widthwise")):
            found = f"{name.rsplit('/', 1)[-1]}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found or type(module).__name__
