"""What is checked: something that makes a model at any width, trains it, and shows its tensors by name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from widthwise.derive.table import Rule

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Effect:
    """What changed in one tensor that a parameter feeds, exactly: own + upstream is the whole change there.

    own: by the parameter's own steps at the input as it is now, ΔW·x. upstream: by the change of the input at the
    initial weight, W₀·Δx; None where the parameter is used bare and has no input.
    """

    name: str
    own: Tensor
    upstream: Tensor | None = None


@dataclass(frozen=True)
class Snapshot:
    """Detached values of one forward pass: tensors and parameters by name."""

    tensors: Mapping[str, Tensor]
    parameters: Mapping[str, Tensor]


class Model(Protocol):
    """A model at one width with its optimizer."""

    optimizer: torch.optim.Optimizer

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """Trainable parameters by role (``role.3`` for the third of several)."""
        ...

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Every tensor by name, gradients retained; the loss is ``loss``."""
        ...

    def effects(self, before: Snapshot, after: Snapshot, batch: Batch) -> Iterator[Effect]:
        """The change of every tensor that a parameter feeds, split by its cause."""
        ...


class Subject(Protocol):
    """Makes models. Equal seeds at different widths share all randomness that does not depend on the width, which is
    what takes the noise out of slopes."""

    def make(self, width: int, seed: int) -> Model: ...

    def slowed(self, rule: Rule, width: int) -> float:
        """What the number of channels leaves of this rule's learning rate in a model of this width, once made."""
        ...

    def batch(self, seed: int) -> Batch:
        """Data for this seed, the same at every width."""
        ...


def mixed(*parts: object) -> int:
    """A seed of full entropy: generators seeded with small related numbers start out related (see verify/sizes.py)."""
    return int.from_bytes(hashlib.sha256(" ".join(map(str, parts)).encode()).digest()[:7])
