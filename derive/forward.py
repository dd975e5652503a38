"""The forward walk: coordinate sizes at initialization and of what training changes, solving knobs on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from sympy import Expr, Symbol

from widthwise.derive.assume import Assumptions
from widthwise.derive.errors import DeriveError
from widthwise.derive.exponents import ZERO, at_most, largest, n_to
from widthwise.derive.facts import Fact
from widthwise.derive.graph import Dim, Graph, Node, Parameter
from widthwise.derive.laws import ZEROS
from widthwise.derive.ops.registry import OPS, Tolerance, lookup
from widthwise.derive.signal import Flip, Partial, Signal, contract, signal
from widthwise.derive.solve import INIT, MULTIPLIER, STEP, Constraint, Knobs


class Change(NamedTuple):
    """One reason a tensor changes in training: its parameter's own step, or what reaches it from upstream."""

    size: Expr
    own: bool
    fact: Fact


@dataclass(frozen=True)
class State:
    """What the walk knows of a tensor: its signal at initialization, and how it changes."""

    init: Signal
    fact: Fact
    changes: tuple[Change, ...] = ()

    @property
    def change(self) -> Expr | None:
        """Size of the change in training; None where nothing upstream trains."""
        return largest(change.size for change in self.changes) if self.changes else None

    @property
    def trained(self) -> Expr:
        """Size after training: that of the initial value or of its change, whichever is larger."""
        return self.init.size if self.change is None else largest((self.init.size, self.change))


class Met(NamedTuple):
    """A contraction over an axis along which a nonlinearity left a small mean."""

    node: Node
    partial: Partial


def walk_forward(graph: Graph, assume: Assumptions, fixed: Mapping[tuple[str, str], Expr]) -> Forward:
    """Walk until no knob of a weight with several uses breaks a bound at a later use.

    A knob is eliminated where its weight is first used; where a later use wants it lower, the walk starts again under
    that cap. Each walk settles at least one more use, so there are at most as many as there are uses; what is still
    broken then is reported as a finding.
    """
    caps: dict[Symbol, tuple[Expr, Constraint]] = {}
    walk = Forward(graph, assume, Knobs(fixed, caps)).run()
    for _ in range(sum(len(graph.consumers(role)) for role in graph.parameters)):
        lower = walk.knobs.exceeded_later()
        if all(symbol in caps and at_most(caps[symbol][0], bound) for symbol, (bound, _) in lower.items()):
            break
        caps = caps | lower
        walk = Forward(graph, assume, Knobs(fixed, caps)).run()
    return walk


@dataclass
class Forward:
    """State of the walk, and the services that op rules use."""

    graph: Graph
    assume: Assumptions
    knobs: Knobs
    states: dict[str, State] = field(default_factory=dict)
    met: list[Met] = field(default_factory=list)
    _settled: set[str] = field(default_factory=set)
    _demands: dict[str, frozenset[Tolerance]] = field(default_factory=dict)

    def run(self) -> Forward:
        for parameter in self.graph.parameters.values():
            self.states[parameter.role] = self._leaf(parameter)
        for node in self.graph.ordered:
            op = lookup(node)
            for slot, source in enumerate(node.inputs):
                if op.tolerance(slot) in ("absolute", "relative"):
                    self.settle(source)
            self.states[node.output] = op.forward(self, node)
        self.knobs.finish()
        for name in self.states:
            self.states[name] = self._resolved(self.states[name])
        self._check_carries()
        return self

    def _check_carries(self) -> None:
        """Refuse a repeated block whose output does not look to the next layer as its input did.

        Where knobs fixed by the request broke a bound, the finding about that bound says more.
        """
        if self.knobs.violations:
            return
        for before, after in self.graph.carries:
            sizes = [self.states[name].init.size for name in (before, after)]
            if sizes[0] != sizes[1]:
                raise DeriveError(
                    f"a repeated block takes {before} of size {n_to(sizes[0])} to {after} of size {n_to(sizes[1])}, "
                    "so its layers differ",
                    where=after,
                    cure="describe the layers one by one",
                )

    # -- parameters ---------------------------------------------------------------------------------------------

    def _leaf(self, parameter: Parameter) -> State:
        role = parameter.role
        uses = list(self.graph.consumers(role))
        carried = [node for node, _ in uses if node.attrs.get("carrier") == role]
        if carried and (INIT, role) not in self.knobs.fixed and (MULTIPLIER, role) not in self.knobs.fixed:
            self.knobs.fix(INIT, role, ZERO, "gauge: drawn at unit scale, its multiplier carries the width")
        if (INIT, role) not in self.knobs.fixed and uses and all(self.starts_at_zero(role, node) for node, _ in uses):
            self.knobs.fix(INIT, role, ZERO, "it starts at zero, whatever it is scaled by")
        size = self.knobs.unknown(INIT, role, parameter.where)
        odd: dict[Flip, float] = {}
        if parameter.law.symmetric:
            odd = {
                Flip(role, frozenset(dim.name for dim in group.dims), side): 0.0
                for side, group in enumerate(parameter.shape)
            }
        fact = Fact(
            f"initial {role}",
            size,
            "drawn from a sign-symmetric law" if parameter.law.symmetric else "a fixed or one-sided base value",
        )
        bare = parameter.trainable and any(
            OPS[node.op].tolerance(slot) != "weight" for node, slot in uses if node.op in OPS
        )
        return State(signal(size, odd), fact, (self._own_step(role, role, parameter.where),) if bare else ())

    def _own_step(self, role: str, output: str, where: str) -> Change:
        size = self.knobs.unknown(STEP, f"{role}@{output}", where)
        return Change(size, True, Fact(f"own step of {role} in {output}", size, "as large as what it feeds tolerates"))

    def own_step(self, node: Node, role: str) -> tuple[Change, ...]:
        """The change a weight's own step makes in the output of this node, an unknown until something bounds it."""
        if not self.graph.parameters[role].trainable:
            return ()
        return (self._own_step(role, node.output, node.where),)

    def starts_at_zero(self, name: str, node: Node) -> bool:
        """Whether this is a parameter that adds nothing to the sum ``node`` before training, as biases do."""
        parameter = self.graph.parameters.get(name)
        return parameter is not None and parameter.law == ZEROS and node.op in ("add", "residual")

    def multiplier(self, node: Node, role: str) -> Expr:
        """The forward multiplier of a weight at this node: solved where the node carries one, else n^0 or fixed."""
        carrier = node.attrs.get("carrier")
        name = carrier or role
        if (MULTIPLIER, name) in self.knobs.fixed:
            return self.knobs.unknown(MULTIPLIER, name, node.where)
        return self.knobs.unknown(MULTIPLIER, name, node.where) if carrier else ZERO

    # -- services for op rules ----------------------------------------------------------------------------------

    def inputs(self, node: Node) -> tuple[State, ...]:
        return tuple(self.states[source] for source in node.inputs)

    def contract(self, node: Node, a: Signal, b: Signal, over: tuple[Dim, ...], branch: str = "") -> tuple[Signal, str]:
        """Multiply and sum two forward signals, noting any small mean that was met."""
        outcome = contract(a, b, over, branch or self.assume.activations, self.assume.nonlinear_mean)
        self.met.extend(Met(node, partial) for partial in outcome.partial)
        return outcome.signal, outcome.because

    def fact(self, node: Node, init: Signal, because: str, assumed: str = "") -> Fact:
        """The fact that this node's output has that size."""
        parents = tuple(self.states[source].fact for source in node.inputs)
        return Fact(node.output, self.knobs.size(init), because, parents, frozenset((assumed,) if assumed else ()))

    # -- where sizes meet a scale -------------------------------------------------------------------------------

    def settle(self, tensor: str) -> None:
        """Bound a tensor's size and change by what its consumers tolerate, which solves the knobs in it."""
        if tensor in self._settled:
            return
        self._settled.add(tensor)
        state = self.states[tensor]
        demands = self.demands(tensor)
        # In this order: where several bounds tie, the first is named as the one that binds.
        bounds = [
            Constraint(term.size, ZERO, f"{tensor} must stay Θ(1) at initialization", state.fact)
            for term in state.init.terms
        ]
        if "absolute" in demands:
            bounds += [
                Constraint(
                    change.size,
                    ZERO,
                    f"{tensor} tolerates a change of Θ(1)"
                    if change.own
                    else f"changes that reach {tensor} from upstream must stay Θ(1)",
                    change.fact,
                )
                for change in state.changes
            ]
        self.knobs.impose(bounds)
        if "absolute" not in demands:
            size = self.knobs.resolved(state.init).size
            self.knobs.impose(
                Constraint(change.size, size, f"{tensor} tolerates a change of its own size, {n_to(size)}", change.fact)
                for change in state.changes
                if change.own
            )
        settled = self._resolved(state)
        # Bounded once: whatever reads the tensor from here on meets its change as one from upstream.
        self.states[tensor] = replace(settled, changes=tuple(each._replace(own=False) for each in settled.changes))

    def demands(self, tensor: str) -> frozenset[Tolerance]:
        """What the consumers of a tensor tolerate, looking through ops that pass changes on."""
        if tensor not in self._demands:
            found: set[Tolerance] = set()
            for node, slot in self.graph.consumers(tensor):
                tolerance = lookup(node).tolerance(slot)
                found |= self.demands(node.output) if tolerance == "passes" else {tolerance}
            self._demands[tensor] = frozenset(found)
        return self._demands[tensor]

    def _resolved(self, state: State) -> State:
        value = self.knobs.value
        return replace(
            state,
            init=self.knobs.resolved(state.init),
            changes=tuple(change._replace(size=value(change.size)) for change in state.changes),
        )
