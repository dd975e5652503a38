"""Optimizers: each is one function from a gradient's size to the size and structure of one step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sympy import Expr

from widthwise.derive.errors import unknown_name
from widthwise.derive.exponents import HALF, ZERO, largest


@dataclass(frozen=True)
class Weight:
    """What an optimizer sees of a parameter: sizes of its gradient and entries, fan-in and fan-out exponents
    (both zero where it is not a matrix)."""

    gradient: Expr
    entry: Expr
    fan_in: Expr = ZERO
    fan_out: Expr = ZERO
    matrix: bool = False


@dataclass(frozen=True)
class Step:
    """One step at learning rate one: entries of size n^entry, or (``spectral``) all singular values n^spectral."""

    entry: Expr
    spectral: Expr | None = None

    def gain(self, fan_in: Expr, fan_out: Expr, aligned: bool) -> Expr:
        """Entry size of ΔW·x over that of x. A step is a sum of a few g xᵀ, so it meets x coherently."""
        if self.spectral is not None and aligned:
            return self.spectral + (fan_in - fan_out) * HALF
        return self.entry + fan_in * (1 if aligned else HALF)


@dataclass(frozen=True)
class Law:
    """How one optimizer steps, and what its weight decay and eps are added to.

    Attributes:
        step: the step as a function of the parameter's sizes.
        decay: ``coupled`` adds wd·w to the gradient, ``decoupled`` multiplies the weight by 1 − lr·wd.
        eps: the size of what eps is added to, as a function of the same sizes; None where there is no eps.
    """

    step: Callable[[Weight], Step]
    decay: str
    eps: Callable[[Weight], Expr | None]
    summary: str


def _gradient(weight: Weight) -> Step:
    return Step(weight.gradient)


def _sign(weight: Weight) -> Step:
    return Step(ZERO)


def _orthogonal(weight: Weight) -> Step:
    if not weight.matrix:  # vectors and tables are given to AdamW, as every implementation does
        return _sign(weight)
    return Step(-largest((weight.fan_in, weight.fan_out)) * HALF, spectral=ZERO)


def _relative(weight: Weight) -> Step:
    return Step(weight.entry)


def _gradient_size(weight: Weight) -> Expr | None:
    return weight.gradient


def _gradient_size_of_vectors(weight: Weight) -> Expr | None:
    return None if weight.matrix else weight.gradient


def _no_eps(weight: Weight) -> Expr | None:
    return None


OPTIMIZERS: Mapping[str, Law] = {
    "sgd": Law(_gradient, "coupled", _no_eps, "step = gradient; momentum changes no exponent"),
    "adam": Law(_sign, "coupled", _gradient_size, "entries Θ(1); weight decay added to the gradient"),
    "adamw": Law(_sign, "decoupled", _gradient_size, "entries Θ(1); decoupled weight decay"),
    "lion": Law(_sign, "decoupled", _no_eps, "entries ±1; decoupled weight decay"),
    "muon": Law(
        _orthogonal, "decoupled", _gradient_size_of_vectors, "matrices orthogonalized, everything else as under AdamW"
    ),
    "adafactor": Law(_relative, "decoupled", _no_eps, "entries relative to the weight's rms"),
}


def optimizer(name: str) -> Law:
    """The law of an optimizer by name.

    Raises:
        DeriveError: when there is none of that name.
    """
    if name not in OPTIMIZERS:
        raise unknown_name("optimizer", name, list(OPTIMIZERS))
    return OPTIMIZERS[name]


def decay_exponent(law: Law, weight: Weight, lr: Expr) -> Expr:
    """Weight decay that shrinks the weight by a width-independent factor per step.

    Decoupled, and coupled where the step is the gradient itself: lr·wd is constant. Coupled where the step forgets
    the gradient's scale: wd·w must stay in proportion to the gradient.
    """
    if law.decay == "decoupled" or law.step is _gradient:
        return -lr
    return weight.gradient - weight.entry
