"""Carrying runs out: several at a time on this machine, or over a Ray cluster. An executor is a function from runs to
outcomes as they finish."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Any

from widthwise.derive.errors import DeriveError, unknown_name
from widthwise.verify.transfer.config import Run

Outcome = Mapping[str, Any]
Executor = Callable[[Sequence[Run], int], Iterator[tuple[Run, Outcome]]]

FAILED = "error"
"""The key of an outcome that is none: what went wrong. Such a run is not recorded, and is tried again next time."""


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
        return {FAILED: f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}


def local(runs: Sequence[Run], jobs: int) -> Iterator[tuple[Run, Outcome]]:
    """On this machine, ``jobs`` at a time, each process with its share of the cores."""
    if jobs == 1:
        yield from ((run, attempt(run)) for run in runs)
        return
    context = multiprocessing.get_context("spawn")  # CUDA cannot be forked
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin, initargs=(jobs,)) as pool:
        waiting = iter(runs)
        running: dict[Future[Outcome], Run] = {}
        try:
            while True:
                while len(running) < jobs and (run := next(waiting, None)) is not None:
                    running[pool.submit(attempt, run)] = run
                if not running:
                    return
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(done), done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _begin(jobs: int) -> None:
    import os
    import signal
    import threading
    import time

    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it, and ends its workers
    parent = os.getppid()

    def watch() -> None:  # a parent that was killed leaves no orphans behind
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


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
