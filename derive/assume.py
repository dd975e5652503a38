"""What a derivation assumes of the inner products it meets: named sets, presets of publications, regimes.

An assumption set only says *which branch* of theory each kind of contraction takes. It never holds an exponent.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from widthwise.derive.errors import DeriveError, unknown_name

Regime = Literal["practical", "asymptotic", "throughout"]
"""Sizes below the crossovers; past them; or below them with learning rates that hold on both sides."""


@dataclass(frozen=True)
class Assumptions:
    """One branch for each kind of contraction.

    Attributes:
        activations: two activations met at initialization (q·k): ``symmetry`` decides by sign flips.
        activations_trained: a change of one activation met with another activation (Δq·k).
        own_step: a parameter's own update met with its input (ΔW·x).
        upstream: an initial weight met with a change of its input (W₀·Δx).
        upstream_readout: the same for the readout, which publications treat apart.
        forward_backward: a forward with a backward quantity (v·∂L/∂o, a gradient summed over heads).
        backward_weight: an initial weight met with a back-propagated gradient (W₀ᵀ·g).
        nonlinear_mean: what to make of a mean that a nonlinearity creates (SiLU): ``crossover`` compares the
            axis with the length at which the mean takes over, ``coherent`` and ``ignored`` do not look.
        channels: whether steps that follow gradients are held for the ``typical`` channel or, where several trained
            factors multiply in each, for the ``largest`` one of very many, or for the ``first`` that gets away at the
            widths people train (see :mod:`widthwise.derive.channels`).
        carrying: whether they are held besides for the one channel that carries a sum after that, where one does.
    """

    name: str
    source: str
    activations: Literal["symmetry", "aligned"] = "symmetry"
    activations_trained: Literal["aligned", "incoherent"] = "aligned"
    own_step: Literal["aligned", "incoherent"] = "aligned"
    upstream: Literal["operator-norm", "incoherent"] = "operator-norm"
    upstream_readout: Literal["operator-norm", "incoherent"] = "operator-norm"
    forward_backward: Literal["symmetry", "aligned"] = "symmetry"
    backward_weight: Literal["symmetry", "operator-norm"] = "symmetry"
    nonlinear_mean: Literal["crossover", "coherent", "ignored"] = "crossover"
    channels: Literal["typical", "largest", "first"] = "typical"
    carrying: bool = False
    regime: Regime = "practical"
    regimes: tuple[Regime, ...] = ("practical",)
    preset: bool = False

    def statements(self) -> tuple[str, ...]:
        """The set in words, one line per kind of contraction."""
        statements = tuple(
            f"{subject}: {_WORDS[branch]}"
            for subject, branch in (
                ("activation · activation at init", self.activations),
                ("Δactivation · activation", self.activations_trained),
                ("ΔW·x, a parameter's own step", self.own_step),
                ("W₀·Δx, changes from upstream", self.upstream),
                ("W₀·Δx at the readout", self.upstream_readout),
                ("forward · backward", self.forward_backward),
                ("W₀ᵀ·g, back-propagation", self.backward_weight),
                ("means that nonlinearities create", self.nonlinear_mean),
            )
        )
        if self.channels != "typical":
            statements += (f"products of trained factors: {_WORDS[self.channels]}",)
        if self.carrying:
            statements += ("sums that one channel carries once it has got away: curvature along it is held",)
        if self.regime == "throughout":
            statements += ("learning rates: of each role the smallest that holds before and past the crossovers",)
        return statements


_WORDS = {
    "symmetry": "coherent unless a sign flip of some random weight negates the terms one by one",
    "aligned": "coherent (training aligns it)",
    "incoherent": "incoherent (independent signs)",
    "operator-norm": "bounded by the operator norm of the initial weight, and assumed to reach the bound",
    "crossover": "incoherent on axes shorter than the crossover, coherent on longer ones",
    "coherent": "coherent (past every crossover)",
    "largest": "no channel gets away sooner, the largest of all included",
    "first": "the first of all channels gets away no sooner, as their products' flow is integrated",
    "ignored": "ignored: a nonlinearity is treated as if it were odd",
}

SETS: dict[str, Assumptions] = {
    each.name: each
    for each in (
        Assumptions(
            "at-init",
            "statistics at initialization decided by sign symmetry; own steps aligned; "
            "upstream changes at their operator-norm bound",
            regimes=("practical", "asymptotic", "throughout"),
        ),
        Assumptions(
            "largest-channel",
            "as at-init; where trained factors multiply in each channel and steps follow gradients, learning rates are "
            "held for the largest channel rather than the typical one",
            channels="largest",
            regimes=("practical", "asymptotic", "throughout"),
        ),
        Assumptions(
            "first-channel",
            "as largest-channel, with what nonlinearities between the factors do at the widths people train: each "
            "product's flow is integrated, where largest-channel counts factors, which is the limit of many channels",
            channels="first",
            regimes=("practical", "asymptotic", "throughout"),
        ),
        Assumptions(
            "carrying-channel",
            "as first-channel; where one channel carries what training adds to a sum, as the products' flow tells, "
            "learning rates are held for the curvature along it, a power of n",
            channels="first",
            carrying=True,
            regimes=("practical", "asymptotic", "throughout"),
        ),
        Assumptions(
            "aligned",
            "every inner product that training can align is coherent",
            activations="aligned",
            forward_backward="aligned",
            backward_weight="operator-norm",
            nonlinear_mean="coherent",
            regime="asymptotic",
            regimes=("asymptotic",),
        ),
        Assumptions(
            "unaligned",
            "no inner product is aligned by training",
            activations_trained="incoherent",
            own_step="incoherent",
            upstream="incoherent",
            upstream_readout="incoherent",
            nonlinear_mean="ignored",
        ),
    )
}

PRESETS: dict[str, Assumptions] = {
    each.name: each
    for each in (
        Assumptions(
            "liu-gu-2026",
            "Liu & Gu 2026, arXiv:2606.04048: nonlinearities ignored, o·∂L/∂o incoherent, "
            "gate matrices initialized as hidden weights",
            upstream="incoherent",
            nonlinear_mean="ignored",
            preset=True,
        ),
        Assumptions(
            "tensor-programs-v",
            "Yang et al. 2022, arXiv:2203.03466, Tables 3 and 8: attention scores and their gradients aligned",
            forward_backward="aligned",
            nonlinear_mean="ignored",
            preset=True,
        ),
        Assumptions(
            "everett-full-alignment",
            "Everett et al. 2024, arXiv:2407.05872: ΔW·x aligned, W₀·Δx not",
            upstream="incoherent",
            upstream_readout="incoherent",
            nonlinear_mean="ignored",
            preset=True,
        ),
        Assumptions(
            "everett-no-alignment",
            "Everett et al. 2024, arXiv:2407.05872: neither ΔW·x nor W₀·Δx aligned",
            own_step="incoherent",
            upstream="incoherent",
            upstream_readout="incoherent",
            nonlinear_mean="ignored",
            preset=True,
        ),
    )
}


def assumptions(
    assume: str | Assumptions | None = None, preset: str | None = None, regime: str | None = None
) -> Assumptions:
    """The assumption set a request means.

    Raises:
        DeriveError: for unknown names, and for requests that contradict each other.
    """
    if preset is not None:
        if assume is not None:
            given = assume.name if isinstance(assume, Assumptions) else assume
            raise DeriveError(
                f"preset {preset!r} is itself an assumption set and contradicts assume={given!r}",
                cure="give one of the two",
            )
        if preset not in PRESETS:
            raise unknown_name("preset", preset, list(PRESETS))
        chosen = PRESETS[preset]
    elif isinstance(assume, Assumptions):
        chosen = assume
    else:
        name = assume or "at-init"
        if name not in SETS:
            raise unknown_name("assumption set", name, list(SETS))
        chosen = SETS[name]
    if regime is None:
        return chosen
    if regime not in get_args(Regime):
        raise unknown_name("regime", regime, list(get_args(Regime)))
    if regime not in chosen.regimes:
        raise DeriveError(
            f"assumption set {chosen.name!r} contradicts the {regime} regime",
            cure=f"it stands for the {chosen.regime} one; use --assume at-init to choose a regime",
        )
    return in_regime(chosen, regime)


def in_regime(chosen: Assumptions, regime: Regime) -> Assumptions:
    """The same set in another regime. Past its crossovers means have taken over, forward · backward has aligned, and
    channels are so many that their factors' number alone tells when the first gets away (not which
    sums one of them carries: of three factors many do at any width that is built)."""
    if regime != "asymptotic" or regime == chosen.regime:
        return replace(chosen, regime=regime)
    return replace(
        chosen,
        regime=regime,
        nonlinear_mean="coherent",
        forward_backward="aligned",
        channels="largest" if chosen.channels == "first" else chosen.channels,
    )
