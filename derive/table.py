"""The result of a derivation: rules, tensors, findings, assumptions; what tables, files and code are made of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import log
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sympy import Expr

from widthwise.derive.errors import DeriveError, unknown_name
from widthwise.derive.exponents import HALF, ZERO, at_most, largest, n_to, show
from widthwise.derive.facts import Fact, settled
from widthwise.derive.graph import atoms, extent
from widthwise.derive.optimizers import OPTIMIZERS

if TYPE_CHECKING:
    from widthwise.derive.backward import Backward
    from widthwise.derive.rules import Derived

KNOBS = ("init_std", "multiplier", "lr", "weight_decay", "eps", "norm_eps")


@dataclass(frozen=True)
class Rule:
    """How the knobs of one role scale. Every knob is an exponent: multiply the base value by (n / n_base)^knob.

    ``norm_eps`` is set only where a multiplier in front of a norm was absorbed into that norm's eps. None means
    that the role has no such knob. ``lr_log`` is set where the largest of many channels bounds the learning rate:
    multiply lr by (ln N / ln N_base)^lr_log besides and divide weight decay by it, with N the size of ``channels``.
    """

    role: str
    parameters: tuple[str, ...] = ()
    shape: tuple[str, ...] = ()
    init_std: Expr | None = None
    multiplier: Expr | None = None
    lr: Expr | None = None
    weight_decay: Expr | None = None
    eps: Expr | None = None
    norm_eps: Expr | None = None
    binding: str = ""
    assumed: tuple[str, ...] = ()
    lr_log: Expr | None = None
    channels: str = ""

    def as_dict(self) -> dict[str, Any]:
        plain: dict[str, Any] = {"role": self.role, "parameters": list(self.parameters), "shape": list(self.shape)}
        plain |= {knob: None if (value := getattr(self, knob)) is None else show(value) for knob in KNOBS}
        logs = {} if self.lr_log is None else {"lr_log": show(self.lr_log), "channels": self.channels}
        return plain | logs | {"binding": self.binding, "assumed": list(self.assumed)}

    def slowed(self, channels: float, at_base: float) -> float:
        """What so many channels, and so many at the base width, leave of the learning rate: (ln N / ln N_base)^lr_log,
        1.0 where that has no say.

        Raises:
            DeriveError: when it has, and there are fewer than two.
        """
        if self.lr_log is None:
            return 1.0
        if min(channels, at_base) < 2:
            raise DeriveError(
                f"lr of {self.role} depends on the number of channels, {self.channels}, which would be "
                f"{min(channels, at_base):g}",
                cure="take a wider model as the base",
            )
        return float((log(channels) / log(at_base)) ** float(self.lr_log))

    def factors(self, width: float, base_width: float, slowed: float | None = None) -> dict[str, float]:
        """What to multiply each base value by at this width: exactly 1.0 at the base width.

        Args:
            slowed: what :meth:`slowed` says, where the number of channels has a say.

        Raises:
            DeriveError: when an exponent is symbolic, or the number of channels is needed and not given.
        """
        if self.lr_log is not None and slowed is None:
            raise DeriveError(
                f"lr of {self.role} depends on the number of channels, {self.channels}, which the width does not tell",
                cure="generate a parametrization, whose models tell it, or derive with --assume at-init",
            )
        exponents = {knob: value for knob in KNOBS if (value := getattr(self, knob)) is not None}
        for knob, value in exponents.items():
            if value.free_symbols:
                raise DeriveError(
                    f"{knob} of {self.role} is {n_to(value)}", cure="derive one scaling, not the mixed one"
                )
        found: dict[str, float] = {knob: (width / base_width) ** float(value) for knob, value in exponents.items()}
        for knob, by in (("lr", slowed), ("weight_decay", 1 / slowed)) if slowed is not None else ():
            if knob in found:
                found[knob] *= by
        return found


@dataclass(frozen=True)
class TensorSize:
    """Coordinate sizes of a named tensor at initialization, of its gradient, and the axes along which it has a mean."""

    name: str
    forward: Expr
    gradient: Expr | None
    coherent_in: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "forward": show(self.forward),
            "gradient": None if self.gradient is None else show(self.gradient),
            "coherent_in": list(self.coherent_in),
        }


@dataclass(frozen=True)
class Finding:
    """Something a hand derivation would miss."""

    kind: str
    where: str
    exponent: Expr
    message: str
    cure: str

    def as_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "where": self.where,
            "exponent": show(self.exponent),
            "message": self.message,
            "cure": self.cure,
        }


@dataclass(frozen=True)
class RuleTable:
    """Everything a derivation found. Equal derivations have equal hashes; proofs are kept beside (as the work
    still to do for one), not hashed."""

    architecture: str
    optimizer: str
    scaling: str
    regime: str
    gauge: str
    options: Mapping[str, str]
    assumptions: tuple[str, ...]
    rules: tuple[Rule, ...]
    tensors: tuple[TensorSize, ...]
    findings: tuple[Finding, ...]
    prove: Mapping[str, Callable[[], tuple[Fact, ...]]] = field(
        default_factory=lambda: MappingProxyType({}), compare=False, repr=False
    )

    @classmethod
    def of(
        cls, walk: Backward, optimizer: str, derived: tuple[Derived, ...], findings: tuple[Finding, ...], gauge: str
    ) -> RuleTable:
        """The table of one finished derivation."""
        graph, assume = walk.graph, walk.assume
        norm = _global_norm(walk)
        return cls(
            graph.name,
            optimizer,
            graph.options.get("scaling", "width"),
            assume.regime,
            gauge,
            dict(graph.options),
            (
                f"{assume.name}: {assume.source}",
                *assume.statements(),
                *(
                    ("gauge: sizes, findings and the first steps of proofs are those of the multiplier gauge",)
                    if gauge == "absorbed"
                    else ()
                ),
                "optimizer: " + OPTIMIZERS[optimizer].summary,
                f"clipping: the norm of all gradients is {n_to(norm)}, so a clip threshold ∝ {n_to(norm)} acts alike "
                "at every width",
            ),
            tuple(each.rule for each in derived),
            _tensors(walk),
            findings,
            {each.rule.role: partial(settled, each.facts, walk.knobs.settled) for each in derived},
        )

    def with_findings(self, more: Iterable[Finding]) -> RuleTable:
        return replace(self, findings=(*self.findings, *more))

    def rule(self, role: str) -> Rule:
        """The rule of a role.

        Raises:
            DeriveError: when there is none.
        """
        for rule in self.rules:
            if rule.role == role:
                return rule
        raise unknown_name("role", role, [rule.role for rule in self.rules])

    def tensor(self, name: str) -> TensorSize:
        """The sizes of a named tensor.

        Raises:
            DeriveError: when the description names no such tensor.
        """
        for tensor in self.tensors:
            if tensor.name == name:
                return tensor
        raise unknown_name("tensor", name, [tensor.name for tensor in self.tensors])

    def content(self) -> dict[str, Any]:
        """All that the hash covers, as plain values."""
        return {
            "architecture": self.architecture,
            "optimizer": self.optimizer,
            "scaling": self.scaling,
            "regime": self.regime,
            "gauge": self.gauge,
            "options": dict(sorted(self.options.items())),
            "assumptions": list(self.assumptions),
            "rules": [rule.as_dict() for rule in self.rules],
            "tensors": [tensor.as_dict() for tensor in self.tensors],
            "findings": [finding.as_dict() for finding in self.findings],
        }

    @property
    def hash(self) -> str:
        """SHA-256 over the canonical JSON of the content."""
        return content_hash(self.content())

    @property
    def knobs_hash(self) -> str:
        """SHA-256 over what a model is scaled by alone: not over how that was found, nor what else was."""
        kept = ("architecture", "optimizer", "scaling", "gauge", "options")
        rules = [
            {key: value for key, value in rule.as_dict().items() if key not in ("binding", "assumed")}
            for rule in self.rules
        ]
        return content_hash({key: value for key, value in self.content().items() if key in kept} | {"rules": rules})

    def as_dict(self) -> dict[str, Any]:
        return self.content() | {"hash": self.hash}


def _global_norm(walk: Backward) -> Expr:
    """The exponent of the norm of all gradients together."""
    return largest(
        walk.gradients[role].size + extent(atoms(parameter.shape)) * HALF
        for role, parameter in walk.graph.parameters.items()
        if role in walk.gradients
    )


def _tensors(walk: Backward) -> tuple[TensorSize, ...]:
    sizes = []
    for name in walk.graph.named:
        signal = walk.forward.states[name].init
        exact = [
            {axis for flip, mean in term.odd.items() if mean == 0.0 for axis in flip.axes}
            for term in signal.terms
            if at_most(signal.size, term.size)
        ]
        coherent = tuple(
            dim.name
            for dim in atoms(walk.graph.shapes[name])
            if dim.exponent != ZERO and any(dim.name not in axes for axes in exact)
        )
        gradient = walk.gradients.get(name)
        sizes.append(TensorSize(name, signal.size, gradient.size if gradient else None, coherent))
    return tuple(sizes)


def content_hash(content: Mapping[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()
