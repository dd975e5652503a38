"""Which results belong together: a file keeps every run, those of a sweep that was edited since among them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from widthwise.derive.errors import DeriveError
from widthwise.verify.transfer.config import Sweep

COMMON = "data", "sizes", "training"


def own(sweep: Sweep, entries: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The results that the sweep as it is now would have, at any width, learning rate and seed."""
    for entry in entries:
        try:
            run = sweep.run(entry["parametrization"], entry["width"], entry["lr"], entry["seed"])
        except DeriveError:  # of a parametrization that is no longer there
            continue
        if run.key == entry["key"]:
            yield entry


def check_comparable(entries: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Whether all runs were trained alike, and those of each parametrization by the same rules, so that one curve can
    be drawn through them and the base is every one's.

    Raises:
        DeriveError: naming what they differ in.
    """
    first: dict[str, dict[str, str]] = {}
    for entry in entries:
        for whose, keys in (("", COMMON), (f" of {entry['parametrization']}", ("rules", "lr_multipliers", "request"))):
            here = dict(_said(entry, keys))
            there = first.setdefault(whose, here)
            differing = sorted(key for key in here.keys() | there.keys() if here.get(key) != there.get(key))
            if differing:
                raise DeriveError(
                    f"{path} has runs{whose} that differ in {', '.join(differing)}: one table would mix them",
                    cure="widthwise sweep FILE.toml tells those of one sweep file",
                )


def _said(entry: Mapping[str, Any], keys: Iterable[str]) -> Iterator[tuple[str, str]]:
    """How a run was made, but for its place in the grid. What is None goes unsaid, as in results from before it."""
    for key in keys:
        value = entry.get(key)
        parts = {f"{key}.{name}": each for name, each in value.items()} if isinstance(value, dict) else {key: value}
        for name, each in parts.items():
            if each is not None and name != "training.graph":
                yield name, json.dumps(each, sort_keys=True)
