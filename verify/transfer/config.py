"""What a sweep file says, read with suspicion, and the runs that it stands for."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from widthwise.codegen.request import Request
from widthwise.derive.architectures import ARCHITECTURES
from widthwise.derive.architectures import options as options_of
from widthwise.derive.assume import PRESETS
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
    norm_eps: float | None = None  # of every RMS norm (those of q and k are L2 norms); the model's own where not given
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
    rules: str  # the hash of what the model is scaled by, so that other rules are other runs
    lr_multipliers: Mapping[str, float] = field(default_factory=dict)  # by role, at every width

    @property
    def key(self) -> str:
        content = asdict(self)
        if not self.lr_multipliers:  # as results from before there were any
            del content["lr_multipliers"]
        for each in fields(Training):
            # A field that came later and is not given is left out, so that results from before it are known again; and
            # so is how a run is carried out, which changes no number of it.
            unsaid = each.default is None and content["training"][each.name] is None
            if unsaid or not each.compare:
                del content["training"][each.name]
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    @property
    def order(self) -> tuple[int, int, float, str]:
        """Small models first and parametrizations side by side, so that a sweep shows something early; then again
        with the next seed."""
        return self.seed, self.width, self.lr, self.parametrization


@dataclass(frozen=True)
class Variant:
    """A parametrization of one's own: the options of ``widthwise derive`` by which it differs from the derived one.

    ``lr_multipliers`` are no rule but hyperparameters beside the learning rate, to be tuned at the base width as it is:
    what the learning rate of a role is multiplied by at every width, the base's too.
    """

    assume: str | None = None
    preset: str | None = None
    regime: str | None = None
    parametrization: str | None = None
    fix: tuple[str, ...] = ()
    options: tuple[str, ...] = ()  # of the architecture, beside the sweep's
    lr_multipliers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Grid:
    """A part of a sweep that is denser or sparser than the rest; what it does not say is as in the sweep.

    With ``around``, only learning rates within so many octaves of the best one at the base width, on either side:
    such runs are known when the base width's are finished.
    """

    parametrizations: tuple[str, ...] = ()
    widths: tuple[int, ...] = ()
    learning_rates: tuple[float, ...] = ()
    seeds: tuple[int, ...] = ()
    around: float | None = None


@dataclass(frozen=True)
class Sweep:
    """All runs to compare. ``sizes`` are those at the base width; ``data`` is ``stdlib``, a task of mqar, or a path."""

    name: str
    architecture: str
    optimizer: str
    base_width: int
    widths: tuple[int, ...]
    learning_rates: tuple[float, ...]
    sizes: Mapping[str, int]
    training: Training
    scaling: str | None = None  # heads-fixed, where it is one of ours that has scalings
    parametrizations: tuple[str, ...] = (STANDARD, DERIVED)
    seeds: tuple[int, ...] = (0,)
    data: str = "stdlib"
    tied: bool = False
    options: tuple[str, ...] = ()
    variants: Mapping[str, Variant] = field(default_factory=dict)
    grids: tuple[Grid, ...] = ()  # instead of the product of the above; the important ones first
    extend: int = 0  # learning rates that may be added at either end of a curve whose lowest loss is there

    def stages(self, tuned: Mapping[str, float] | None = None) -> list[list[Run]]:
        """The runs of each grid, small models first; those of earlier grids are not repeated. ``tuned`` holds the best
        learning rate at the base width by parametrization, where it is known.

        Raises:
            DeriveError: for a parametrization that there is not.
        """
        made: dict[str, Run] = {}
        stages = []
        for grid in self.grids or (Grid(),):
            points = itertools.product(
                grid.parametrizations or self.parametrizations,
                grid.widths or self.widths,
                grid.learning_rates or self.learning_rates,
                grid.seeds or self.seeds,
            )
            near = (point for point in points if self._near(grid, point[0], point[2], tuned or {}))
            new = {run.key: run for run in itertools.starmap(self.run, near) if run.key not in made}
            made |= new
            stages.append(sorted(new.values(), key=lambda run: run.order))
        return stages

    def _near(self, grid: Grid, name: str, lr: float, tuned: Mapping[str, float]) -> bool:
        if grid.around is None:
            return True
        return name in tuned and abs(math.log2(lr / tuned[name])) < grid.around + 0.01

    def runs(self) -> Iterator[Run]:
        """All runs, stage by stage, but for those that wait for results."""
        return itertools.chain.from_iterable(self.stages())

    def run(self, name: str, width: int, lr: float, seed: int) -> Run:
        """One of the runs. At the base width parametrizations of one model are the same and go by the first one's name;
        a model is another where the architecture's options or its roles' learning rates are.

        Raises:
            DeriveError: for a parametrization that there is not.
        """
        if width == self.base_width:
            name = next(each for each in self.parametrizations if self._at_base(each) == self._at_base(name))
        request = self._request(name)
        base = width if name == STANDARD else self.base_width
        sizes = dict(self.sizes) | {"width": self.base_width}
        return Run(
            name,
            width,
            lr,
            seed,
            request,
            base,
            sizes,
            self.training,
            self.data,
            _hash(request),
            self._variant(name).lr_multipliers,
        )

    def _at_base(self, name: str) -> tuple[object, ...]:
        """What a parametrization is at the base width, where rules change nothing."""
        return self._request(name).options, self._variant(name).lr_multipliers

    def _variant(self, name: str) -> Variant:
        return self.variants.get(name, Variant(preset=None if name in (STANDARD, DERIVED) else name))

    def _request(self, name: str) -> Request:
        variant = self._variant(name)
        return Request(
            self.architecture,
            optimizer=self.optimizer,
            scaling=self.scaling or _usual_scaling(self.architecture),
            assume=variant.assume,
            preset=variant.preset,
            regime=variant.regime,
            parametrization=variant.parametrization,
            fix=variant.fix,
            tied=self.tied,
            options=(*self.options, *variant.options),
        )


def _usual_scaling(architecture: str) -> str | None:
    ours = architecture in ARCHITECTURES and "scaling" in options_of(architecture)
    return "heads-fixed" if ours else None  # one's own graph has the options that it has


@cache
def _hash(request: Request) -> str:
    return request.table().knobs_hash


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
    if not isinstance(content.get("training"), dict):
        raise DeriveError(f"{path} has no [training]", cure="see docs/transfer.md for an example")
    sweep = Sweep(**_checked(Sweep, content, str(path)))
    _check(sweep, path)
    return sweep


def _check(sweep: Sweep, path: Path) -> None:
    training = sweep.training
    if training.batch % training.accumulate or min(training.steps, training.batch, training.length) < 1:
        raise DeriveError(
            f"{path}: steps, batch and length must be positive, and batch a multiple of accumulate", cure="correct them"
        )
    for name, value, low, high in (
        ("warmup", training.warmup, 0, training.steps),
        ("final", training.final, 0, 1),
        ("clip", training.clip, 0, math.inf),
        ("weight_decay", training.weight_decay, 0, math.inf),
        ("beta1", training.beta1, 0, 1),
        ("beta2", training.beta2, 0, 1),
        ("momentum", training.momentum, 0, 1),
        ("eps", training.eps, 0, math.inf),
        ("validation", training.validation, 1, math.inf),
    ):
        if not (low <= value <= high and math.isfinite(value)):
            within = f"at least {low}" if high == math.inf else f"between {low} and {high}"
            raise DeriveError(f"{path}: {name} is {value:g}, and must be {within}", cure="correct it")
    if training.norm_eps is not None and not 0 <= training.norm_eps < math.inf:
        raise DeriveError(
            f"{path}: norm_eps must be a number, not negative nor infinite", cure="leave it out for the model's own"
        )
    if len(set(sweep.widths)) < len(sweep.widths) or min(sweep.widths) < 1:
        raise DeriveError(
            f"{path}: widths {list(sweep.widths)} are not different positive numbers", cure="correct them"
        )
    if sweep.base_width not in sweep.widths:
        raise DeriveError(
            f"{path}: widths lack the base width {sweep.base_width}", cure="add it: transfer starts there"
        )
    if min(sweep.learning_rates + tuple(lr for grid in sweep.grids for lr in grid.learning_rates)) <= 0:
        raise DeriveError(f"{path}: learning rates must be positive", cure="correct them")
    if sweep.grids and all(grid.around is not None for grid in sweep.grids):
        raise DeriveError(f"{path}: no grid begins, as all of them wait for another", cure="give the base width one")
    for name, variant in sweep.variants.items():
        if any(not 0 < each < math.inf for each in variant.lr_multipliers.values()):
            raise DeriveError(f"{path}: lr_multipliers of {name} must be positive numbers", cure="correct them")
    known = [DERIVED, STANDARD, *sweep.variants, *PRESETS]
    for name in sweep.parametrizations:
        if name not in known:
            raise unknown_name(f"parametrization of {path}", name, known)
    for name in sweep.variants:
        if name not in sweep.parametrizations:
            raise DeriveError(
                f"{path}: variant {name} is none of its parametrizations", cure="add it there, or take it out"
            )
    for grid in sweep.grids:
        stray = [f"width {each}" for each in grid.widths if each not in sweep.widths]
        stray += [f"parametrization {each}" for each in grid.parametrizations if each not in sweep.parametrizations]
        if stray:
            raise DeriveError(f"{path}: {stray[0]} of a grid is none of the sweep's", cure="add it there")


def _checked(kind: type[Any], content: Mapping[str, Any], where: str) -> dict[str, Any]:
    hints = get_type_hints(kind)
    known = {each.name: each for each in fields(kind)}
    for key in content:
        if key not in known:
            raise unknown_name(f"key of {where}", key, list(known))
    for name, each in known.items():
        if name not in content and each.default is MISSING and each.default_factory is MISSING:
            raise DeriveError(f"{where} lacks {name}", cure="see docs/transfer.md for an example")
    return {key: _value(value, hints[key], f"{where}: {key}") for key, value in content.items()}


def _value(value: Any, hint: Any, what: str) -> Any:
    """A TOML value as the kind that a field has, and nothing else."""
    origin = get_origin(hint)
    if origin is UnionType:  # something or None, which TOML cannot say
        return _value(value, get_args(hint)[0], what)
    if origin is tuple and isinstance(value, list) and value:
        return tuple(_value(each, get_args(hint)[0], what) for each in value)
    if origin is not None and isinstance(value, dict):
        return {key: _value(each, get_args(hint)[1], f"{what}.{key}") for key, each in value.items()}
    if is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        return hint(**_checked(hint, value, what))
    if hint is float and type(value) in (int, float):
        return float(value)
    if origin is None and type(value) is hint:
        return value
    kind = origin or hint
    raise DeriveError(f"{what} cannot be {value!r}", cure=f"it is {_KINDS.get(kind, 'a table')}")


_KINDS: Mapping[object, str] = {
    tuple: "a list with something in it",
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
}
