"""Generated source as a module."""

import pickle
import sys
import traceback

import pytest

pytest.importorskip("torch")
from widthwise.verify.loading import imported

TEXT = "class A:\n    x = 1\n\n\ndef fails():\n    raise KeyError('here')\n"


def test_is_made_once_and_stays_importable() -> None:
    module = imported(TEXT, "own")
    assert imported(TEXT, "own") is module
    assert imported(TEXT + "y = 2\n", "own") is not module
    assert isinstance(pickle.loads(pickle.dumps(module.A())), module.A)


def test_tracebacks_show_its_lines() -> None:
    with pytest.raises(KeyError) as caught:
        imported(TEXT, "own").fails()
    assert "raise KeyError('here')" in "".join(traceback.format_tb(caught.tb))


def test_what_does_not_run_is_no_module() -> None:
    before = set(sys.modules)
    with pytest.raises(ZeroDivisionError):
        imported("1 / 0\n", "own")
    assert set(sys.modules) == before
