"""Processes of this machine that carry runs out, each on its GPU: begun once, kept warm, replaced where they end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass
class Worker(Generic[Item]):
    """A process, our end of the pipe to it, and what it works on."""

    process: Any
    pipe: Connection
    item: Item


class Pool(Generic[Item, Result]):
    """Calls ``work`` on items, one a process.

    Args:
        work: a function that can be pickled, as items and results can.
        places: one a process: the device that it sees as its only one (a value of CUDA_VISIBLE_DEVICES), or None.
        lost: the result for an item whose process ended, given its exit code.
        spent: whether a process should be replaced after a result, since its device's state may be broken.
    """

    def __init__(
        self,
        work: Callable[[Item], Result],
        places: Sequence[str | None],
        lost: Callable[[int | None], Result],
        spent: Callable[[Result], bool],
    ) -> None:
        self.work, self.places, self.lost, self.spent = work, places, lost, spent
        self.context = multiprocessing.get_context("spawn")  # CUDA cannot be forked

    def map(self, items: Sequence[Item]) -> Iterator[tuple[Item, Result]]:
        """Every item with its result, as they finish; begun in order."""
        waiting = iter(items)
        workers: dict[Connection, Worker[Item]] = {}
        places = {}
        try:
            for place, item in zip(self.places, waiting, strict=False):
                worker = self._begin(place, item)
                workers[worker.pipe], places[worker.pipe] = worker, place
            while workers:
                for pipe in wait(list(workers)):
                    assert isinstance(pipe, Connection)
                    worker, place = workers[pipe], places[pipe]
                    done = worker.item
                    try:
                        result = pipe.recv()
                        ended = self.spent(result)
                    except (EOFError, OSError):
                        worker.process.join()
                        result, ended = self.lost(worker.process.exitcode), True
                    following = next(waiting, None)
                    if ended or following is None:
                        del workers[pipe]
                        self._end(worker)
                    if following is not None:
                        if ended:
                            worker = self._begin(place, following)
                            workers[worker.pipe], places[worker.pipe] = worker, place
                        else:
                            worker.item = following
                            pipe.send(following)
                    yield done, result
        finally:
            for worker in workers.values():
                self._end(worker)

    def _begin(self, place: str | None, item: Item) -> Worker[Item]:
        ours, theirs = self.context.Pipe()
        threads = max(1, (os.cpu_count() or 1) // len(self.places))
        process = self.context.Process(target=_serve, args=(theirs, self.work, place, threads), daemon=True)
        process.start()
        theirs.close()
        ours.send(item)
        return Worker(process, ours, item)

    def _end(self, worker: Worker[Item]) -> None:
        worker.process.kill()  # what it had to say was heard
        worker.process.join()
        worker.pipe.close()


def _serve(pipe: Connection, work: Callable[[Any], Any], place: str | None, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it, and ends its workers
    if place is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = place  # before anything looks for devices
    _end_with(os.getppid())
    import torch

    torch.set_num_threads(threads)
    while True:
        try:
            item = pipe.recv()
        except EOFError:
            return
        pipe.send(work(item))


def _end_with(parent: int) -> None:
    """A parent that was killed leaves no orphans behind."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
