"""Marks: ``gpu`` tests are skipped, by name, where there is no CUDA device; ``slow`` ones without --run-slow."""

import importlib.util
import os

import pytest

# Tensors here are small: a second thread gains nothing, and waiting for it on a busy machine costs a hundredfold.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="also run the tests marked slow")


def has_cuda() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = {mark for item in items for mark in ("gpu", "slow") if item.get_closest_marker(mark)}
    no_gpu = "gpu" in wanted and not has_cuda()
    no_slow = not config.getoption("--run-slow")
    for item in items:
        if no_gpu and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and there is none here"))
        if no_slow and item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: pass --run-slow to run it"))
