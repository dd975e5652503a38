"""Gauge moves: trading a forward multiplier for init and learning rate, or for a norm's eps.

Scaling a weight by n^θ and its multiplier by n^−θ leaves the function alone. What the learning rate has to do
follows from how the optimizer's step scales with the gradient and the weight: it is read off the optimizer's law.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sympy import Expr

from widthwise.derive.backward import Backward
from widthwise.derive.errors import unknown_name
from widthwise.derive.exponents import ZERO, n_to
from widthwise.derive.facts import Fact
from widthwise.derive.graph import Node
from widthwise.derive.optimizers import Law, Weight
from widthwise.derive.rules import Derived

GAUGES = ("multiplier", "absorbed")


def moved(rule: Derived, law: Law, theta: Expr) -> Derived:
    """The same rule with its multiplier raised by n^theta and init, lr, weight decay and eps following."""
    assert rule.update is not None
    assert rule.rule.init_std is not None
    assert rule.rule.multiplier is not None
    before = rule.update.weight
    after = Weight(before.gradient + theta, before.entry - theta, before.fan_in, before.fan_out, before.matrix)
    lr = rule.update.lr - theta + law.step(before).entry - law.step(after).entry
    update = replace(
        rule.update,
        lr=lr,
        weight=after,
        weight_decay=law.decay.exponent(after, lr),
        eps=law.eps(after),
    )
    gauge = Fact(
        f"{rule.rule.role} in the absorbed gauge: lr",
        lr,
        f"{n_to(theta)} moves from init std to multiplier; the learning rate follows the optimizer's law",
        rule.facts,
    )
    return replace(
        rule,
        facts=(*rule.facts, gauge),
        update=update,
        rule=replace(
            rule.rule,
            multiplier=rule.rule.multiplier + theta,
            init_std=rule.rule.init_std - theta,
            lr=lr,
            weight_decay=update.weight_decay,
            eps=update.eps,
        ),
    )


def absorbed(walk: Backward, law: Law, rules: Sequence[Derived], gauge: str) -> tuple[Derived, ...]:
    """The rules in the gauge asked for.

    Raises:
        DeriveError: for an unknown gauge.
    """
    if gauge not in GAUGES:
        raise unknown_name("gauge", gauge, list(GAUGES))
    if gauge == "multiplier":
        return tuple(rules)
    by_role = {rule.rule.role: rule for rule in rules}
    for role, rule in list(by_role.items()):
        theta = rule.rule.multiplier
        if theta is None or theta == ZERO:
            continue
        if rule.rule.parameters and (rule.update is None or len(walk.graph.consumers(role)) > 1):
            by_role[role] = _stays(rule)  # frozen, or used elsewhere too: rescaling it would change that use
            continue
        if rule.node is not None and (norm := _norm_behind(walk, rule.node)) is not None:
            by_role[role] = _into_eps(rule, norm, theta)
            continue
        owner = _owner(walk, rule.node, role)
        if owner is None or by_role[owner].update is None:
            by_role[role] = _stays(rule)
        elif owner == role:
            by_role[role] = moved(rule, law, -theta)
        else:
            taking = by_role[owner]
            assert taking.rule.multiplier is not None
            shifted = moved(
                replace(taking, rule=replace(taking.rule, multiplier=taking.rule.multiplier + theta)), law, -theta
            )
            note = f"absorbs the multiplier of {role}, {n_to(theta)}"
            by_role[owner] = replace(shifted, rule=replace(shifted.rule, binding=f"{shifted.rule.binding}; {note}"))
            by_role[role] = replace(
                rule, rule=replace(rule.rule, multiplier=ZERO, binding=f"{rule.rule.binding}; absorbed into {owner}")
            )
    return tuple(by_role.values())


def _into_eps(rule: Derived, norm: Node, theta: Expr) -> Derived:
    """RMSNorm(m·x; eps) = RMSNorm(x; eps/m²)."""
    return replace(
        rule,
        rule=replace(
            rule.rule,
            multiplier=ZERO,
            norm_eps=-2 * theta,
            binding=f"{rule.rule.binding}; absorbed into the eps of the norm that makes {norm.output}",
        ),
    )


def _stays(rule: Derived) -> Derived:
    return replace(
        rule, rule=replace(rule.rule, binding=f"{rule.rule.binding}; kept: no single untied weight can absorb it")
    )


def _norm_behind(walk: Backward, node: Node) -> Node | None:
    """The norm that alone reads a scale node's output."""
    readers = [reader for reader, _ in walk.graph.consumers(node.output)]
    if node.op == "scale" and len(readers) == 1 and readers[0].op in ("rms_norm", "layer_norm", "l2_norm"):
        return readers[0]
    return None


def _owner(walk: Backward, node: Node | None, role: str) -> str | None:
    """The parameter that can take a multiplier: found upstream along ops that are linear in it."""
    if node is None:
        return role
    makers = walk.graph.makers
    while True:
        weight = node.inputs[1] if node.op in ("linear", "conv1d") else None
        if weight is not None:
            alone = len(walk.graph.consumers(weight)) == 1
            if alone:
                return weight
            source = node.inputs[0]  # a tied weight: look at what it multiplies
        elif node.op in ("scale", "reshape", "einsum"):
            for candidate in node.inputs:
                if candidate in walk.graph.parameters and len(walk.graph.consumers(candidate)) == 1:
                    return candidate
            source = node.inputs[0]
        else:
            return None
        if len(walk.graph.consumers(source)) != 1 or source not in makers:
            return None
        node = makers[source]
