"""From solved knobs to rules: one per parameter role, and one per multiplier that stands alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from sympy import Expr

from widthwise.derive.backward import Backward
from widthwise.derive.channels import Slower, slower
from widthwise.derive.escape import CHANNELS
from widthwise.derive.exponents import ZERO, show
from widthwise.derive.facts import Fact, ancestry
from widthwise.derive.graph import Node, Parameter
from widthwise.derive.optimizers import Law
from widthwise.derive.solve import INIT, MULTIPLIER
from widthwise.derive.table import Rule
from widthwise.derive.update import LR, Update


@dataclass(frozen=True)
class Derived:
    """A rule with what a gauge move needs to know of it, and the facts that prove it."""

    rule: Rule
    facts: tuple[Fact, ...]
    update: Update | None = None
    node: Node | None = None  # the node whose multiplier this is


def assemble(walk: Backward, law: Law, updates: Mapping[str, Update]) -> tuple[Derived, ...]:
    """All rules, parameters and lone multipliers in the order the forward pass meets them."""
    carriers = {str(node.attrs["carrier"]): node for node in walk.graph.ordered if node.attrs.get("carrier")}
    order: dict[str, None] = {}
    for node in walk.graph.ordered:
        for source in node.inputs:
            if source in walk.graph.parameters:
                order.setdefault(source)
        if node.attrs.get("carrier"):
            order.setdefault(str(node.attrs["carrier"]))
    crowds = law.follows and walk.assume.channels != "typical"
    # what holds a role back by a power of n is below what any power of ln N asks of it, for wide enough models
    held = {role for role, update in updates.items() if update.held or (LR, role) in walk.knobs.fixed}
    crowded = slower(walk.graph, integrate=walk.assume.channels == "first", but=held) if crowds else {}
    derived = []
    for role in order:
        parameter = walk.graph.parameters.get(role)
        carrying = carriers.get(role)
        if parameter is not None:
            rule = _of_parameter(walk, law, parameter, updates.get(role), carrying)
            derived.append(_for_the_first(walk, rule, crowded[role]) if role in crowded else rule)
        elif carrying is not None:
            derived.append(_of_multiplier(walk, role, carrying))
    return tuple(derived)


def _of_parameter(walk: Backward, law: Law, parameter: Parameter, update: Update | None, node: Node | None) -> Derived:
    role = parameter.role
    knobs = walk.knobs
    facts = [knobs.bindings[knobs.symbol(INIT, role)]]
    multiplier = ZERO
    if knobs.symbol(MULTIPLIER, role) in knobs.values:
        multiplier = knobs.values[knobs.symbol(MULTIPLIER, role)]
        facts.append(knobs.bindings[knobs.symbol(MULTIPLIER, role)])
    binding = tuple(facts) if update is None else (*facts, update.binding)
    proof = binding if update is None else (*binding, *_followers(walk, law, role, update))
    return Derived(
        Rule(
            role,
            parameter.patterns,
            tuple(map(str, parameter.shape)),
            init_std=walk.states[role].init.size,
            multiplier=multiplier,
            lr=update.lr if update else None,
            weight_decay=update.weight_decay if update else None,
            eps=update.eps if update else None,
            binding="; ".join(f"{fact.subject.split(' of ')[0]}: {fact.because}" for fact in binding),
            assumed=_assumed(proof),
        ),
        proof,
        update,
        node,
    )


def _for_the_first(walk: Backward, derived: Derived, asked: Slower) -> Derived:
    """The rule with a learning rate that the channel stands which is the first to get away."""
    channels = asked.channels
    which = walk.assume.channels
    why = (
        f"and of {CHANNELS[1]} channels the first gets away by that sooner than of {CHANNELS[0]} (the product's "
        "flow, integrated with the functions in it)"
        if which == "first"
        else "and the largest, which begins √(2 ln N) typical ones high, gets away first"
    )
    fact = Fact(
        f"lr of {derived.rule.role}, for the {which} channel",
        ZERO,
        f"no power of n, but (ln N)^{show(asked.power)} besides: {channels.told} behind {channels.at}, {why}",
        derived.facts[-1:],
        frozenset((f"products of trained factors: {which} channel",)),
    )
    rule = replace(
        derived.rule,
        lr_log=asked.power,
        channels=str(channels.axes),
        binding=f"{derived.rule.binding}; lr: {len(channels.roles)} trained factors in each channel of {channels.axes}",
        assumed=tuple(sorted({*derived.rule.assumed, *fact.assumed})),
    )
    return replace(derived, rule=rule, facts=(*derived.facts, fact))


def _followers(walk: Backward, law: Law, role: str, update: Update) -> tuple[Fact, ...]:
    """The facts that weight decay and eps follow from."""
    decay = Fact(
        f"weight_decay of {role}",
        update.weight_decay,
        law.decay.because,
        (update.binding,),
    )
    if update.eps is None:
        return (decay,)
    return decay, Fact(f"eps of {role}", update.eps, "as large as what it is added to", (walk.facts[role],))


def _of_multiplier(walk: Backward, role: str, node: Node) -> Derived:
    fact = walk.knobs.bindings[walk.knobs.symbol(MULTIPLIER, role)]
    value: Expr = walk.knobs.values[walk.knobs.symbol(MULTIPLIER, role)]
    return Derived(
        Rule(role, multiplier=value, binding=f"multiplier: {fact.because}", assumed=_assumed((fact,))),
        (fact,),
        None,
        node,
    )


def _assumed(facts: tuple[Fact, ...]) -> tuple[str, ...]:
    return tuple(sorted({each for fact in ancestry(*facts) for each in fact.assumed}))
