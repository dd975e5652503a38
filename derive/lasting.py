"""Learning rates that last: no larger than any time in training allows.

What is incoherent before the first step is aligned by training, and which inner products are, when, no walk can tell.
A learning rate is used before and after. So of each role the smallest of three is taken: the one that holds as training
begins, the one that holds past the crossovers, and, where steps follow gradients, for the factors of an inner product
q·k that begins incoherent in front of a norm, the one at which they move q·k by no more than it is. (Steps of a size of
their own do so for a while, until q·k is coherent, and do no harm: measured under AdamW.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from sympy import Expr

from widthwise.derive.assume import in_regime
from widthwise.derive.backward import Backward
from widthwise.derive.exponents import n_to, smallest
from widthwise.derive.facts import Fact, settled
from widthwise.derive.forward import walk_forward
from widthwise.derive.optimizers import Law
from widthwise.derive.scan_norms import Outgrown, outgrown
from widthwise.derive.update import LR, Update, solve_updates

Fixed = Mapping[tuple[str, str], Expr]


def lasting(early: Backward, updates: Mapping[str, Update], law: Law, fixed: Fixed) -> dict[str, Update]:
    """The updates of a model as it begins, with learning rates that hold from the first step to the last."""
    past = in_regime(early.assume, "asymptotic")
    late = Backward(walk_forward(early.graph, past, fixed)).run()
    later = solve_updates(late, law, fixed)
    norms = list(outgrown(early.forward)) if law.follows else []
    found = {}
    for role, update in updates.items():
        rates = [update.binding]
        if later[role].lr != update.lr:
            *_, binding = settled((later[role].binding,), late.knobs.settled)  # its facts are of another walk
            rates.append(replace(binding, because=f"past the crossovers: {binding.because}"))
        holds = [_hold(update, norm) for norm in norms if role in norm.roles]
        found[role] = update if (LR, role) in fixed else _slowed(update, rates, holds, law)
    return found


def _hold(update: Update, norm: Outgrown) -> Fact:
    return Fact(
        update.binding.subject,
        update.lr - update.slower - norm.excess,
        f"its steps move {norm.scan.inputs[0]}·{norm.scan.inputs[1]} coherently, {n_to(norm.excess)} more than it is "
        f"as training begins, in front of {norm.norm.output}",
        (update.binding,),
    )


def _slowed(update: Update, rates: list[Fact], holds: list[Fact], law: Law) -> Update:
    lr = smallest(rate.value for rate in rates + holds)
    if lr == update.lr:
        return update
    binding = next((rate for rate in rates + holds if rate.value == lr), None)
    return replace(
        update,
        lr=lr,
        weight_decay=law.decay.exponent(update.weight, lr),
        binding=binding or Fact(update.binding.subject, lr, "the smallest of several", (*rates, *holds)),
        slower=lr - (update.lr - update.slower),
        held=update.held or binding in holds,
    )
