"""What one optimizer step does: from gradients and tolerances to learning rate, weight decay and eps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from sympy import Expr

from widthwise.derive.backward import Backward
from widthwise.derive.carrier import ASKED
from widthwise.derive.channels import Slower, carried
from widthwise.derive.exponents import ZERO, largest, n_to, show, smallest
from widthwise.derive.facts import Fact
from widthwise.derive.graph import Parameter, atoms, extent
from widthwise.derive.ops.registry import lookup
from widthwise.derive.optimizers import Law, Step, Weight
from widthwise.derive.solve import STEP

LR = "lr"


@dataclass(frozen=True)
class Update:
    """The step of one parameter: its learning-rate exponent, what bound it, and what follows from it."""

    lr: Expr
    weight_decay: Expr
    eps: Expr | None
    binding: Fact
    weight: Weight
    effects: tuple[Fact, ...]  # (size of what the step moves at lr exponent 0) for each use, for audits
    bounds: tuple[Expr, ...]
    slower: Expr = ZERO  # how far lr was put below what this walk allows
    held: bool = False  # whether that is by a power of n for what powers of ln N would be asked for

    @property
    def allowed(self) -> Expr:
        """The learning rate at which no use is moved by more than it tolerates, whatever was fixed or slowed."""
        return smallest(_tolerated(self.effects, self.bounds))

    @property
    def excess(self) -> Expr:
        """How far the step goes beyond what is tolerated, at the use that feels it most: zero unless lr was fixed."""
        return largest(self.lr - self.slower - rate for rate in _tolerated(self.effects, self.bounds))


def _tolerated(effects: Sequence[Fact], bounds: Sequence[Expr]) -> list[Expr]:
    """For each use the learning rate at which the step moves it by as much as it tolerates."""
    return [bound - effect.value for effect, bound in zip(effects, bounds, strict=True)]


def weight_of(walk: Backward, parameter: Parameter) -> Weight:
    """What the optimizer sees of a parameter."""
    uses = [node.op for node, _ in walk.graph.consumers(parameter.role)]
    linear, convolution, embedded = ("linear" in uses, "convolution" in uses, "embedding" in uses)
    split = 1 if convolution else -1  # [out, in, taps…] beside [out…, in]
    return Weight(
        gradient=walk.gradients[parameter.role].size,
        entry=walk.states[parameter.role].init.size,
        fan_in=extent(atoms(parameter.shape[split:])) if linear or convolution else ZERO,
        fan_out=extent(atoms(parameter.shape[:split])) if linear or convolution else ZERO,
        # tables and readouts are given to the entrywise optimizer by every implementation of Muon
        matrix=(linear or convolution)
        and not embedded
        and not any(node.attrs.get("carrier") for node, _ in walk.graph.consumers(parameter.role)),
    )


def solve_updates(walk: Backward, law: Law, fixed: Mapping[tuple[str, str], Expr]) -> dict[str, Update]:
    """The largest learning rate of each parameter at which its own step moves every tensor it feeds by no more
    than that tensor tolerates: the maximal update."""
    updates: dict[str, Update] = {}
    asked = carried(walk.graph) if law.follows and walk.assume.carrying else {}
    for role, parameter in walk.graph.parameters.items():
        if parameter.trainable:
            update = _solve_one(walk, parameter, law, fixed.get((LR, role)))
            free = role in asked and (LR, role) not in fixed
            updates[role] = _for_the_carrying(update, asked[role], law) if free else update
    return updates


def _solve_one(walk: Backward, parameter: Parameter, law: Law, pinned: Expr | None) -> Update:
    role = parameter.role
    weight = weight_of(walk, parameter)
    step = law.step(weight)
    uses = _uses(walk, role, step)
    effects, bounds = tuple(effect for effect, _ in uses), tuple(bound.value for _, bound in uses)
    candidates = _tolerated(effects, bounds)
    if pinned is not None:
        lr, binding = pinned, Fact(f"lr of {role}", pinned, "fixed by the request")
    else:
        lr = smallest(candidates)
        effect, bound = uses[next((index for index, each in enumerate(candidates) if each == lr), 0)]
        binding = Fact(
            f"lr of {role}",
            lr,
            f"{bound.because}: the step moves it by n^(lr {_signed(effect.value)}) and it "
            f"tolerates {n_to(bound.value)}",
            (effect, bound),
        )
    eps = law.eps(weight)
    return Update(
        lr,
        law.decay.exponent(weight, lr),
        eps,
        binding,
        weight,
        effects,
        bounds,
    )


def _for_the_carrying(update: Update, asked: Slower, law: Law) -> Update:
    """The update at a rate that the channel stands which carries the sum once it has got away."""
    channels = asked.channels
    lr = update.lr + asked.power
    binding = Fact(
        update.binding.subject,
        lr,
        f"{channels.told} behind {channels.at}; of those that are summed, along {channels.summed}, the one that gets "
        f"away carries what training adds to the sum ({channels.share:.0%} of it in a median model of {ASKED}), and "
        f"curvature along it is {n_to(-asked.power)} larger",
        (update.binding,),
        frozenset(("products of trained factors: carrying channel",)),
    )
    decay = law.decay.exponent(update.weight, lr)
    return replace(update, lr=lr, weight_decay=decay, binding=binding, slower=asked.power, held=True)


def _uses(walk: Backward, role: str, step: Step) -> list[tuple[Fact, Fact]]:
    """For each use of a parameter: the effect of its step at lr exponent 0, and what is tolerated there."""
    found: list[tuple[Fact, Fact]] = []
    knobs, forward = walk.knobs, walk.forward
    gradient = walk.facts[role]
    bare = False
    for node, slot in walk.graph.consumers(role):
        op = lookup(node)
        if op.tolerance(slot) != "weight":
            bare = True
            continue
        assert op.effect is not None
        size = knobs.value(op.effect(forward, node, step))
        inputs = tuple(forward.states[source].fact for source in node.inputs if source != role)
        aligned = forward.assume.own_step
        effect = Fact(
            f"own step of {role} in {node.output}, over lr",
            size,
            f"step entries {n_to(step.entry)}; ΔW·x {aligned}"
            if inputs
            else f"step entries {n_to(step.entry)}, read one row at a time",
            (gradient, *inputs),
            frozenset((f"ΔW·x: {aligned}",)) if inputs else frozenset(),
        )
        found.append((effect, knobs.bindings[knobs.symbol(STEP, f"{role}@{node.output}")]))
    if bare:
        effect = Fact(
            f"own step of {role}, over lr", step.entry, f"step entries {n_to(step.entry)}, used entrywise", (gradient,)
        )
        found.append((effect, knobs.bindings[knobs.symbol(STEP, f"{role}@{role}")]))
    return found


def _signed(value: Expr) -> str:
    text = show(value)
    return f"- {text[1:]}" if text.startswith("-") else f"+ {text}"
