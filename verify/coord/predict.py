"""What the engine predicts of a training run: one exponent for each thing that can be measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from sympy import Expr

from widthwise.derive import Graph, RuleTable
from widthwise.derive.assume import PRESETS, SETS, Assumptions, in_regime
from widthwise.derive.backward import Backward
from widthwise.derive.errors import DeriveError
from widthwise.derive.exponents import ONE, ZERO, n_to
from widthwise.derive.forward import Forward, walk_forward
from widthwise.derive.laws import ZEROS
from widthwise.derive.ops.registry import lookup
from widthwise.derive.optimizers import Law, Weight
from widthwise.derive.optimizers import optimizer as law_of
from widthwise.derive.solve import STEP
from widthwise.derive.table import KNOBS, Rule
from widthwise.derive.update import solve_updates, weight_of

Kind = Literal["forward", "gradient", "weight", "weight gradient", "step", "own step", "upstream", "change"]

KINDS: Mapping[Kind, str] = {
    "forward": "rms of the tensor's entries at initialization",
    "gradient": "typical size (geometric mean of rows) of the loss gradient at initialization",
    "weight": "rms of the parameter's entries at initialization",
    "weight gradient": "typical size of the parameter's gradient at initialization",
    "step": "the parameter's own change, over its gradient where the optimizer's step follows that",
    "own step": "rms of ΔW·x: what the steps of the parameter itself change in the tensor it feeds",
    "upstream": "rms of W₀·Δx: what reaches that tensor from upstream",
    "change": "rms of the whole change of the tensor since initialization",
}


@dataclass(frozen=True)
class Prediction:
    """One exponent: the quantity grows as n^exponent, or (``bound``) at most so.

    ``name`` is a tensor or a role; steps and changes are named ``role in tensor``. ``tolerated`` is what the tensor
    tolerates where that is known, which a prediction may exceed (the engine then has a finding about it). ``least``,
    where there is one, is the exponent at initialization of what training raises to ``exponent``: steps lie between.
    ``crowded`` is the rule of a step in which the number of channels has a say besides, by a power of its logarithm.
    """

    kind: Kind
    name: str
    exponent: float
    bound: bool = False
    tolerated: float | None = None
    least: float | None = None
    crowded: Rule | None = None

    @property
    def key(self) -> tuple[Kind, str]:
        return self.kind, self.name


def follows_gradient(optimizer: str) -> bool:
    """Whether a step is as large, and as heavy-tailed, as the gradient (SGD), rather than of a size of its own."""
    step = law_of(optimizer).step
    return bool(step(Weight(ONE, ZERO)).entry != step(Weight(ZERO, ZERO)).entry)


def used_in(role: str, tensor: str) -> str:
    """The name of what a parameter does in one tensor that it feeds."""
    return role if tensor == role else f"{role} in {tensor}"


def predictions(graph: Graph, table: RuleTable, assumed: Assumptions | None = None) -> tuple[Prediction, ...]:
    """All predictions for this table on this graph, in the order of the forward pass.

    The table is what is believed: its knobs are fixed, and the engine's own walks give every size that follows. Under a
    table of the engine's own making these are the sizes it was derived with, but for gradients: rules are derived from
    trained sizes, and gradients are measured at initialization, so their adjoint is walked with initial ones.

    Args:
        assumed: the assumption set, where it is not the one that the table names.

    Raises:
        DeriveError: when the table is for another graph, for several regimes at once, or holds symbols.
    """
    _check(graph, table)
    law = law_of(table.optimizer)
    fixed = {
        (knob, rule.role): value
        for rule in table.rules
        for knob in ("init_std", "multiplier", "lr")
        if (value := getattr(rule, knob)) is not None and (knob != "multiplier" or _has_multiplier(graph, rule.role))
    }
    assumed = assumed or _assumed(table)
    walk = Backward(walk_forward(graph, assumed, fixed)).run()
    updates = solve_updates(walk, law, fixed)
    bounds = {role: update.bounds for role, update in updates.items()}
    if table.gauge != "multiplier":
        walk = _as_stepped(walk, law, fixed)
        updates = solve_updates(walk, law, fixed)
    start = Backward(_untrained(walk.forward)).run()
    at_start = solve_updates(start, law, fixed)
    found: list[Prediction] = []
    for name in graph.named:
        if graph.shapes[name] == () or name not in graph.makers:
            continue  # the loss has no exponent to speak of, and a scan's state is never a tensor
        found.append(Prediction("forward", name, _number(walk.states[name].init.size)))
        if name in start.gradients:
            found.append(Prediction("gradient", name, _number(start.gradients[name].size)))
        if (change := walk.states[name].change) is not None:
            found.append(Prediction("change", name, _number(change), bound=True))
    for role, parameter in graph.parameters.items():
        if parameter.law != ZEROS:
            found.append(Prediction("weight", role, _number(walk.states[role].init.size)))
        if not parameter.trainable:
            continue
        found.append(Prediction("weight gradient", role, _number(start.gradients[role].size)))
        update = updates[role]
        rule = table.rule(role)
        crowded = None if rule.lr_log is None else rule
        entry = law.step(weight_of(walk, parameter)).entry
        followed = walk.gradients[role].size if follows_gradient(table.optimizer) else ZERO
        found.append(Prediction("step", role, _number(update.lr + entry - followed), crowded=crowded))
        for tensor, effect, first, tolerated in zip(
            _uses(graph, role), update.effects, at_start[role].effects, bounds[role], strict=True
        ):
            size, least, limit = (
                _number(each) for each in (update.lr + effect.value, update.lr + first.value, tolerated)
            )
            own = Prediction("own step", used_in(role, tensor), size, tolerated=limit, crowded=crowded)
            found.append(own if least == size else replace(own, least=least))
            for change in walk.states[tensor].changes if tensor != role else ():
                if change.fact.subject == f"change of {tensor} from upstream":
                    bound = _number(change.size)
                    found.append(Prediction("upstream", used_in(role, tensor), bound, bound=True, tolerated=limit))
    return tuple(found)


def _untrained(forward: Forward) -> Forward:
    """The same walk with nothing changed by training, so that trained sizes are initial ones."""
    return replace(forward, states={name: replace(state, changes=()) for name, state in forward.states.items()})


def _as_stepped(walk: Backward, law: Law, fixed: Mapping[tuple[str, str], Expr]) -> Backward:
    """The walk with every step as large as its learning rate makes it, rather than as what it feeds would tolerate:
    behind a multiplier that was moved, a tensor has a scale of its own, which no tolerance of the graph knows."""
    start = Backward(_untrained(walk.forward)).run()
    steps = {
        (STEP, f"{role}@{tensor}"): update.lr + effect.value
        for role, update in solve_updates(start, law, fixed).items()
        for tensor, effect in zip(_uses(walk.graph, role), update.effects, strict=True)
    }
    return Backward(walk_forward(walk.graph, walk.assume, {**fixed, **steps})).run()


def _uses(graph: Graph, role: str) -> Iterator[str]:
    """The tensors that a parameter's step is felt in, in the order of Update.effects; itself where it is used bare."""
    tolerances = [(node.output, lookup(node).tolerance(slot)) for node, slot in graph.consumers(role)]
    yield from (output for output, tolerance in tolerances if tolerance == "weight")
    if any(tolerance != "weight" for _, tolerance in tolerances):
        yield role


def _has_multiplier(graph: Graph, role: str) -> bool:
    """Whether a node multiplies by this role's multiplier."""
    return any(
        node.attrs.get("carrier") == role or (node.op in ("linear", "conv1d", "embedding") and role in node.inputs)
        for node in graph.nodes
    )


def _assumed(table: RuleTable) -> Assumptions:
    name = table.assumptions[0].partition(":")[0]
    known = SETS | PRESETS
    if name not in known:
        raise DeriveError(f"the table was derived under {name!r}, which has no name here", cure="use a named set")
    return in_regime(known[name], "asymptotic") if table.regime == "asymptotic" else known[name]


def _check(graph: Graph, table: RuleTable) -> None:
    roles = {rule.role for rule in table.rules}
    if missing := sorted(set(graph.parameters) - roles):
        raise DeriveError(
            f"the rules are not for {graph.name}: they have none for {', '.join(missing)}",
            cure="derive them for this description",
        )
    for rule in table.rules:
        for knob in KNOBS:
            if (value := getattr(rule, knob)) is not None and value.free_symbols:
                raise DeriveError(
                    f"{knob} of {rule.role} is {n_to(value)}", cure="check one scaling, not the mixed one"
                )


def _number(size: Expr) -> float:
    return float(size)
