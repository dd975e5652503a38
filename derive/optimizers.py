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
class Decay:
    """The exponent of weight decay from a parameter's sizes and learning rate, and why."""

    exponent: Callable[[Weight, Expr], Expr]
    because: str


@dataclass(frozen=True)
class Law:
    """How one optimizer steps, and what its weight decay and eps are added to.

    Attributes:
        step: the step as a function of the parameter's sizes.
        decay: what weight decay has to keep, which depends on where the optimizer adds it.
        eps: the size of what eps is added to, as a function of the same sizes; None where there is no eps.
        follows: whether each entry's step is as large as its own gradient, so that what is ahead gets ahead.
    """

    step: Callable[[Weight], Step]
    decay: Decay
    eps: Callable[[Weight], Expr | None]
    summary: str
    follows: bool = False


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


# Decoupled decay multiplies the weight by 1 − lr·wd, and so does SGD's, whose step is the gradient it is added to.
SHRINKS = Decay(lambda weight, lr: -lr, "each step shrinks the weight by a width-independent factor: lr·wd is constant")
# Where the step forgets the gradient's scale, decay added to the gradient can only keep its share of it.
SHARES = Decay(lambda weight, lr: weight.gradient - weight.entry, "wd·w keeps in proportion to the gradient it joins")

OPTIMIZERS: Mapping[str, Law] = {
    "sgd": Law(_gradient, SHRINKS, _no_eps, "step = gradient; momentum changes no exponent", follows=True),
    "adam": Law(_sign, SHARES, _gradient_size, "entries Θ(1); weight decay added to the gradient"),
    "adamw": Law(_sign, SHRINKS, _gradient_size, "entries Θ(1); decoupled weight decay"),
    "lion": Law(_sign, SHRINKS, _no_eps, "entries ±1; decoupled weight decay"),
    "muon": Law(
        _orthogonal, SHRINKS, _gradient_size_of_vectors, "matrices orthogonalized, everything else as under AdamW"
    ),
    "adafactor": Law(_relative, SHRINKS, _no_eps, "entries relative to the weight's rms"),
}


def optimizer(name: str) -> Law:
    """The law of an optimizer by name.

    Raises:
        DeriveError: when there is none of that name.
    """
    if name not in OPTIMIZERS:
        raise unknown_name("optimizer", name, list(OPTIMIZERS))
    return OPTIMIZERS[name]
