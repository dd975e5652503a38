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
from widthwise.derive.exponents import ZERO, n_to, smallest
from widthwise.derive.facts import Fact, settled
from widthwise.derive.forward import walk_forward
from widthwise.derive.optimizers import Law
from widthwise.derive.scan_norms import outgrown
from widthwise.derive.update import LR, Update, solve_updates

Fixed = Mapping[tuple[str, str], Expr]


def lasting(early: Backward, updates: Mapping[str, Update], law: Law, fixed: Fixed) -> dict[str, Update]:
    """The updates of a model as it begins, with learning rates that hold from the first step to the last."""
    past = in_regime(early.assume, "asymptotic")
    late = Backward(walk_forward(early.graph, past, fixed)).run()
    later = {role: update.binding for role, update in solve_updates(late, law, fixed).items()}
    held = {role: each for each in outgrown(early.forward) for role in each.roles} if law.follows else {}
    found = {}
    for role, update in updates.items():
        *_, binding = settled((later[role],), late.knobs.settled)  # its facts are of another walk
        rates = [update.binding, replace(binding, because=f"past the crossovers: {binding.because}")]
        if role in held:
            norm = held[role]
            rates.append(
                Fact(
                    update.binding.subject,
                    update.lr - norm.excess,
                    f"its steps move {norm.scan.inputs[0]}·{norm.scan.inputs[1]} coherently, {n_to(norm.excess)} more "
                    f"than it is as training begins, in front of {norm.norm.output}",
                    (update.binding,),
                )
            )
        found[role] = update if (LR, role) in fixed else _slowed(update, rates, law)
    return found


def _slowed(update: Update, rates: list[Fact], law: Law) -> Update:
    lr = smallest(rate.value for rate in rates)
    slower = lr - update.lr
    if slower == ZERO:
        return update
    binding = next((rate for rate in rates if rate.value == lr), rates[0])
    return replace(
        update,
        lr=lr,
        weight_decay=law.decay.exponent(update.weight, lr),
        held=rates[2:] == [binding],
        binding=binding if binding.value == lr else replace(binding, value=lr, because="the smallest of several"),
        bounds=tuple(bound + slower for bound in update.bounds),
    )
