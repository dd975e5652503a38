"""A pool of processes: every item comes back, whatever becomes of the process that had it."""

import os
import signal

import pytest

pytest.importorskip("torch")
from widthwise.verify.transfer.pool import Pool


def work(item: str) -> tuple[str, int, str | None]:
    if item == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    return item, os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES")


def lost(code: int | None) -> tuple[str, int, str | None]:
    return "lost", code or 0, None


def carried_out(items: list[str], places: list[str | None], spent: str = "") -> dict[str, tuple[str, int, str | None]]:
    pool: Pool[str, tuple[str, int, str | None]] = Pool(work, places, lost, lambda result: result[0] == spent)
    return dict(pool.map(items))


def test_items_are_shared_among_processes_that_stay() -> None:
    results = carried_out(list("abcdef"), ["0", "1"])
    assert {item: result[0] for item, result in results.items()} == {item: item for item in "abcdef"}
    assert len({pid for _, pid, _ in results.values()}) == 2
    by_place = {place: {pid for _, pid, seen in results.values() if seen == place} for place in ("0", "1")}
    assert [len(pids) for pids in by_place.values()] == [1, 1]


def test_a_process_that_ends_is_replaced_and_its_item_is_told_lost() -> None:
    results = carried_out(["a", "dies", "b"], ["GPU-7"])
    assert results["dies"][:2] == ("lost", -signal.SIGKILL)
    assert (results["a"][0], results["b"][0]) == ("a", "b")
    assert results["a"][1] != results["b"][1]
    assert results["b"][2] == "GPU-7"


def test_a_spent_process_is_replaced() -> None:
    results = carried_out(["a", "b", "c"], [None], spent="b")
    assert results["a"][1] == results["b"][1] != results["c"][1]


def test_no_items_need_no_process() -> None:
    assert carried_out([], [None, None]) == {}
