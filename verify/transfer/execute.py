"""Carrying runs out: several at a time on this machine, or over a Ray cluster. An executor is a function from runs to
outcomes as they finish."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from widthwise.derive.errors import DeriveError, unknown_name
from widthwise.verify.transfer.config import Run
from widthwise.verify.transfer.pool import Pool

Outcome = Mapping[str, Any]
Executor = Callable[[Sequence[Run], int], Iterator[tuple[Run, Outcome]]]

FAILED = "error"
"""The key of an outcome that is none: what went wrong. Such a run is not recorded, and is tried again next time."""


BROKEN = "broken"
"""The key of an outcome after which its process can do no more: a fault on a GPU stays until the process ends."""


def attempt(run: Run) -> Outcome:
    """The outcome of a run, or what went wrong: memory is short sometimes, and other runs may fit."""
    from widthwise.verify.transfer.train import train

    try:
        return train(run)
    except DeriveError as error:
        return {FAILED: f"{error.what} ({error.cure})" if error.cure else error.what}
    except Exception as error:  # whatever it is, the runs after it must go on
        if "out of memory" in str(error).lower():
            return {FAILED: "out of memory: run fewer at a time (--jobs), or use checkpoint or accumulate"}
        broken = {BROKEN: True} if "CUDA error" in str(error) else {}
        return {FAILED: f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}", **broken}
    finally:
        _release()


def _release() -> None:
    """Give back what the run held on its GPU, for the other processes there."""
    import torch

    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        gc.collect()
        torch.cuda.empty_cache()


def local(runs: Sequence[Run], jobs: int) -> Iterator[tuple[Run, Outcome]]:
    """On this machine, ``jobs`` at a time on each of its GPUs (or on its cores), which the processes take in turn."""
    places = _places() * jobs
    if len(places) == 1:
        yield from ((run, attempt(run)) for run in runs)
        return
    pool: Pool[Run, Outcome] = Pool(attempt, places, _lost, lambda outcome: BROKEN in outcome)
    yield from pool.map(runs)


def _places() -> list[str | None]:
    """One for each GPU that may be used, as CUDA_VISIBLE_DEVICES names it; or one for the cores."""
    import torch

    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = [name.strip() for name in visible.split(",")] if visible else [str(index) for index in range(count)]
    return [*names[:count]] or [None]


def _lost(code: int | None) -> Outcome:
    if code == -signal.SIGKILL:
        return {FAILED: "its process was killed, as happens where memory is short: run fewer at a time (--jobs)"}
    return {FAILED: f"its process ended with exit code {code}"}


def ray(runs: Sequence[Run], jobs: int) -> Iterator[tuple[Run, Outcome]]:
    """Over the Ray cluster that RAY_ADDRESS names, or one on this machine: ``jobs`` runs a GPU (or a core).

    Raises:
        DeriveError: when Ray is not installed.
    """
    try:
        import ray as engine
    except ImportError:
        raise DeriveError("Ray is not installed", cure="pip install 'widthwise[ray]', or --executor local") from None
    if not engine.is_initialized():
        engine.init(log_to_driver=False)
    gpus = engine.cluster_resources().get("GPU", 0)
    remote = engine.remote(max_retries=2)(attempt).options(num_cpus=0 if gpus else 1, num_gpus=1 / jobs if gpus else 0)
    running = {remote.remote(run): run for run in runs}
    while running:
        (done,), _ = engine.wait(list(running), num_returns=1)
        run = running.pop(done)
        try:
            yield run, engine.get(done)
        except engine.exceptions.RayError as error:
            yield run, {FAILED: f"{type(error).__name__}: {str(error).splitlines()[0]}"}


EXECUTORS: Mapping[str, Executor] = {"local": local, "ray": ray}


def executor(name: str) -> Executor:
    """An executor by name.

    Raises:
        DeriveError: when there is none of that name.
    """
    if name not in EXECUTORS:
        raise unknown_name("executor", name, list(EXECUTORS))
    return EXECUTORS[name]
