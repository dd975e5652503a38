"""The backward walk: the adjoint of the same graph, from the loss to every parameter."""

from __future__ import annotations

from dataclasses import dataclass, field

from sympy import Expr

from widthwise.derive.assume import Assumptions
from widthwise.derive.errors import DeriveError
from widthwise.derive.facts import Fact
from widthwise.derive.forward import Forward, State
from widthwise.derive.graph import Dim, Graph, Node
from widthwise.derive.ops.registry import lookup
from widthwise.derive.signal import Signal, added, contract
from widthwise.derive.solve import Knobs


@dataclass
class Backward:
    """Gradients by tensor name, and the services that op rules use."""

    forward: Forward
    gradients: dict[str, Signal] = field(default_factory=dict)
    facts: dict[str, Fact] = field(default_factory=dict)
    _pieces: dict[str, list[tuple[Signal, Fact]]] = field(default_factory=dict)

    @property
    def graph(self) -> Graph:
        return self.forward.graph

    @property
    def assume(self) -> Assumptions:
        return self.forward.assume

    @property
    def knobs(self) -> Knobs:
        return self.forward.knobs

    @property
    def states(self) -> dict[str, State]:
        return self.forward.states

    def run(self) -> Backward:
        for node in reversed(self.graph.ordered):
            gradient = self._collect(node.output)
            if gradient is None and node.op != "cross_entropy":
                continue  # nothing downstream of it reaches the loss
            seed = gradient or self.states[node.output].init
            for piece in lookup(node).backward(self, node, seed):
                parents = tuple(fact for name in (node.output,) if (fact := self.facts.get(name))) + tuple(
                    self.states[name].fact for name in piece.reads
                )
                source = node.inputs[piece.slot]
                fact = Fact(f"∂L/∂{source}", piece.signal.size, piece.because, parents, piece.assumed)
                self._pieces.setdefault(source, []).append((piece.signal, fact))
        for role, parameter in self.graph.parameters.items():
            if self._collect(role) is None and parameter.trainable:
                raise DeriveError(
                    f"parameter {role!r} gets no gradient",
                    where=parameter.where,
                    cure="connect it to the loss, or declare it trainable=False",
                )
        return self

    def _collect(self, tensor: str) -> Signal | None:
        """The sum of all pieces of a tensor's gradient: one for each use of it."""
        if tensor not in self._pieces:
            return None
        if tensor not in self.gradients:
            pieces = self._pieces[tensor]
            total = added(signal for signal, _ in pieces)
            self.gradients[tensor] = total
            if len(pieces) == 1:
                self.facts[tensor] = pieces[0][1]
            else:
                because = f"the largest of its {len(pieces)} uses"
                self.facts[tensor] = Fact(f"∂L/∂{tensor}", total.size, because, tuple(fact for _, fact in pieces))
        return self.gradients[tensor]

    # -- services for op rules ----------------------------------------------------------------------------------

    def inputs(self, node: Node) -> tuple[State, ...]:
        return self.forward.inputs(node)

    def multiplier(self, node: Node, role: str) -> Expr:
        return self.knobs.value(self.forward.multiplier(node, role))

    def trained(self, tensor: str) -> Signal:
        """A forward factor of a gradient: its signs as at initialization, as large as training makes it.

        The two sizes differ where a weight starts below its maximal update (few outputs, or zero init) and its own
        steps bring the activation up: a learning rate solved for the size at initialization would be too large
        from then on.
        """
        state = self.states[tensor]
        return state.init.shifted(state.trained - state.init.size)

    def contract(self, gradient: Signal, forward: Signal, over: tuple[Dim, ...]) -> tuple[Signal, str]:
        """Multiply a backward with a forward signal and sum."""
        outcome = contract(gradient, forward, over, self.assume.forward_backward, self.assume.nonlinear_mean)
        return outcome.signal, outcome.because

    def product(self, a: Signal, b: Signal, over: tuple[Dim, ...]) -> tuple[Signal, str]:
        """Multiply two forward signals and sum, as the forward walk did."""
        outcome = contract(a, b, over, self.assume.activations, self.assume.nonlinear_mean)
        return outcome.signal, outcome.because
