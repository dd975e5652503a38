"""What a sweep file says, read with suspicion, and the runs that it stands for."""

from __future__ import annotations

import hashlib
import itertools
import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from widthwise.codegen.request import Request
from widthwise.derive.errors import DeriveError, unknown_name

STANDARD, DERIVED = "standard", "widthwise"
"""Parametrizations beside the presets: the rules at their base width, used at every width; and the derived ones."""


@dataclass(frozen=True)
class Training:
    """How each run trains. One step reads ``batch`` sequences of ``length`` tokens, in ``accumulate`` parts."""

    steps: int
    batch: int
    length: int
    warmup: int = 0
    final: float = 0.1  # the learning rate's last value, over its peak
    clip: float = 1.0  # of the norm of all gradients; 0 for none
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.98  # Nesterov's, under SGD
    bf16: bool = False
    checkpoint: bool = False
    compile: bool = False
    accumulate: int = 1
    validation: int = 16  # batches
    graph: bool = field(default=True, compare=False)  # on a GPU, replay steps as a CUDA graph, unless compiled


@dataclass(frozen=True)
class Run:
    """One point of the grid; equal runs have equal keys."""

    parametrization: str
    width: int
    lr: float
    seed: int
    request: Request
    base_width: int
    sizes: Mapping[str, int]
    training: Training
    data: str
    rules: str  # the hash of what was derived, so that other rules are other runs

    @property
    def key(self) -> str:
        content = asdict(self)
        for each in fields(Training):
            if not each.compare:  # how a run is carried out, which changes no number of it
                del content["training"][each.name]
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    @property
    def order(self) -> tuple[int, int, float, str]:
        """Small models first and parametrizations side by side, so that a sweep shows something early; then again
        with the next seed."""
        return self.seed, self.width, self.lr, self.parametrization


@dataclass(frozen=True)
class Sweep:
    """A whole grid. ``sizes`` are those at the base width; ``data`` is ``stdlib``, ``mqar`` or a path."""

    name: str
    architecture: str
    optimizer: str
    base_width: int
    widths: tuple[int, ...]
    learning_rates: tuple[float, ...]
    sizes: Mapping[str, int]
    training: Training
    scaling: str = "heads-fixed"
    parametrizations: tuple[str, ...] = (STANDARD, DERIVED)
    seeds: tuple[int, ...] = (0,)
    data: str = "stdlib"
    tied: bool = False
    options: tuple[str, ...] = field(default=())

    def runs(self) -> Iterator[Run]:
        """All runs, small models first. At the base width parametrizations are one and the same, and run once.

        Raises:
            DeriveError: for a parametrization that there is not.
        """
        runs = []
        for name, width, lr, seed in itertools.product(
            self.parametrizations, self.widths, self.learning_rates, self.seeds
        ):
            if width == self.base_width and name != self.parametrizations[0]:
                continue
            request = self._request(name)
            base = width if name == STANDARD else self.base_width
            runs.append(
                Run(
                    name,
                    width,
                    lr,
                    seed,
                    request,
                    base,
                    dict(self.sizes) | {"width": self.base_width},
                    self.training,
                    self.data,
                    _hash(request),
                )
            )
        return iter(sorted(runs, key=lambda run: run.order))

    def _request(self, name: str) -> Request:
        preset = None if name in (STANDARD, DERIVED) else name
        return Request(
            self.architecture,
            optimizer=self.optimizer,
            scaling=self.scaling,
            preset=preset,
            tied=self.tied,
            options=self.options,
        )


@cache
def _hash(request: Request) -> str:
    return request.table().hash


def read_sweep(path: Path) -> Sweep:
    """The sweep that a TOML file describes.

    Raises:
        DeriveError: naming the key that is missing, unknown or of the wrong kind.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DeriveError(f"cannot read {path}: {error.strerror}", cure="give a sweep file") from None
    except (ValueError, RecursionError) as error:
        raise DeriveError(f"{path} is not TOML: {error}", cure="see docs/transfer.md for an example") from None
    training = content.pop("training", None)
    if not isinstance(training, dict):
        raise DeriveError(f"{path} has no [training]", cure="see docs/transfer.md for an example")
    values = _checked(Sweep, content | {"training": _checked_training(training, path)}, path)
    sweep = Sweep(**values)
    if len(set(sweep.widths)) < len(sweep.widths) or min(sweep.widths) < 1:
        raise DeriveError(
            f"{path}: widths {list(sweep.widths)} are not different positive numbers", cure="correct them"
        )
    if sweep.base_width not in sweep.widths:
        raise DeriveError(
            f"{path}: widths lack the base width {sweep.base_width}", cure="add it: transfer starts there"
        )
    if min(sweep.learning_rates) <= 0:
        raise DeriveError(f"{path}: learning rates must be positive", cure="correct them")
    return sweep


def _checked_training(content: Mapping[str, Any], path: Path) -> Training:
    training = Training(**_checked(Training, content, path))
    if training.batch % training.accumulate or min(training.steps, training.batch, training.length) < 1:
        raise DeriveError(
            f"{path}: steps, batch and length must be positive, and batch a multiple of accumulate", cure="correct them"
        )
    return training


def _checked(kind: type[Any], content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    hints = get_type_hints(kind)
    known = {each.name: each for each in fields(kind)}
    for key in content:
        if key not in known:
            raise unknown_name(f"key of {path}", key, list(known))
    for name, each in known.items():
        if name not in content and each.default is MISSING and each.default_factory is MISSING:
            raise DeriveError(f"{path} lacks {name}", cure="see docs/transfer.md for an example")
    return {key: _value(value, hints[key], f"{path}: {key}") for key, value in content.items()}


def _value(value: Any, hint: Any, what: str) -> Any:
    """A TOML value as the kind that a field has, and nothing else."""
    origin = get_origin(hint)
    if origin is tuple and isinstance(value, list) and value:
        return tuple(_value(each, get_args(hint)[0], what) for each in value)
    if origin is not None and isinstance(value, dict):
        return {key: _value(each, get_args(hint)[1], f"{what}.{key}") for key, each in value.items()}
    if hint is float and type(value) in (int, float):
        return float(value)
    if origin is None and type(value) is hint:
        return value
    raise DeriveError(f"{what} cannot be {value!r}", cure=f"it is of kind {getattr(hint, '__name__', hint)}")
