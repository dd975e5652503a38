"""Channels in which several trained factors multiply, and what the largest of n of them does to a learning rate.

One channel of a sum Σ_c Π_i x_{i,c} is a product of p factors, each trained by its own optimizer step. Where the step
is the gradient, a factor grows as fast as its fellows are large, dx_i/dt ∝ Π_{j≠i} x_j, so that a channel whose factors
begin at x₀ gets away (p ≥ 3) after a time ∝ x₀^-(p-2). The largest of N normal draws begins √(2 ln N) typical
ones high. What it takes for no channel to get away sooner in a wider model is a learning rate ∝ (ln N)^-(p-2)/2: no
power of n, so no size of this engine's shows it. An optimizer whose step has its own size does not see it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sympy import Expr

from widthwise.derive.exponents import HALF, ZERO
from widthwise.derive.graph import Dim, Graph, Group, Node, atoms
from widthwise.derive.ops.einsum import summed
from widthwise.derive.ops.registry import lookup


@dataclass(frozen=True)
class Channels:
    """Channels that are summed in ``at``: their axes, and the roles that have a trained factor of its own in each."""

    at: str
    axes: Group
    roles: tuple[str, ...]

    @property
    def slower(self) -> Expr:
        """The exponent of ln N by which the learning rates of these roles have to scale: -(p-2)/2, 0 for p ≤ 2."""
        return -HALF * max(0, len(self.roles) - 2)


def channels(graph: Graph) -> tuple[Channels, ...]:
    """Wherever channels are summed of which a wider model has more, the factors that multiply in each."""
    return tuple(_summed(graph))


def slower(graph: Graph) -> dict[str, Channels]:
    """For each role the channels that ask most of its learning rate, where any ask something."""
    found: dict[str, Channels] = {}
    for each in channels(graph):
        for role in each.roles if each.slower != ZERO else ():
            if role not in found or each.slower < found[role].slower:
                found[role] = each
    return found


def trained_in(graph: Graph, tensor: str) -> tuple[str, ...]:
    """Every role whose step moves a tensor's entries one by one, back to the linear maps that make them: of a sum, what
    any of its parts has (where :func:`channels` asks for what all have)."""
    found: dict[str, None] = {}
    passed = [tensor]
    for name in passed:  # grows on the way
        maker = graph.makers.get(name)
        if name in graph.parameters:
            found |= dict.fromkeys(_trained(graph, name))
        elif maker is None or (maker.op == "einsum" and summed_by(graph, maker)):
            continue
        elif maker.op in ("linear", "convolution"):
            found |= dict.fromkeys(_trained(graph, maker.inputs[1]))
        else:
            slots = range(len(maker.inputs)) if maker.op in ("add", "residual") else lookup(maker).entrywise
            passed += [maker.inputs[slot] for slot in slots if maker.inputs[slot] not in passed]
    return tuple(found)


_Known = dict[tuple[str, frozenset[Dim]], tuple[str, ...]]
"""Factors by tensor and growing axes: what several read is traced back once."""


def _summed(graph: Graph) -> Iterator[Channels]:
    known: _Known = {}
    for node in graph.ordered:
        dims, factors, met = _contraction(graph, node)
        if growing := _grow(dims):
            factors += tuple(role for name in met for role in _factors(graph, name, growing, known))
            yield Channels(node.output, Group(dims), tuple(dict.fromkeys(factors)))


def _contraction(graph: Graph, node: Node) -> tuple[tuple[Dim, ...], tuple[str, ...], tuple[str, ...]]:
    """The channels that a node sums (with the axes they lie beside, such as heads), the weight that it sums them with,
    and the activations that have them."""
    shapes = graph.shapes
    if node.op in ("linear", "convolution"):
        x, weight = node.inputs
        inputs = shapes[weight][-1:] if node.op == "linear" else shapes[weight][1:2]
        return atoms(inputs), _trained(graph, weight), (x,)
    if node.op == "scan":
        return atoms(shapes[node.inputs[0]]), (), node.inputs[:2]
    if node.op == "einsum":
        one, other = (atoms(shapes[name]) for name in node.inputs)
        if over := summed_by(graph, node):
            beside = set(one) & set(other)
            return tuple(dim for dim in dict.fromkeys(one + other) if dim in beside.union(over)), (), node.inputs
    return (), (), ()


def summed_by(graph: Graph, product: Node) -> tuple[Dim, ...]:
    """The axes that a product of two activations sums."""
    one, other = (graph.shapes[name] for name in product.inputs)
    return summed(one, other, product.shape)


def _grow(dims: tuple[Dim, ...]) -> frozenset[Dim]:
    return frozenset(dim for dim in dims if dim.exponent != ZERO)


def _trained(graph: Graph, name: str) -> tuple[str, ...]:
    parameter = graph.parameters.get(name)
    return (name,) if parameter is not None and parameter.trainable else ()


def _factors(graph: Graph, tensor: str, growing: frozenset[Dim], known: _Known) -> tuple[str, ...]:
    """The trained factors of a tensor's channels, back to the linear maps that make them. A sum has the factors that
    all it adds have in common (biases aside, which begin at zero): a residual stream, none."""
    if (tensor, growing) not in known:
        known[tensor, growing] = tuple(dict.fromkeys(_traced(graph, tensor, growing, known)))
    return known[tensor, growing]


def _traced(graph: Graph, tensor: str, growing: frozenset[Dim], known: _Known) -> tuple[str, ...]:
    if not growing <= set(atoms(graph.shapes[tensor])):
        return ()
    if tensor in graph.parameters:
        return _trained(graph, tensor)
    maker: Node | None = graph.makers.get(tensor)
    if maker is None or (maker.op == "einsum" and summed_by(graph, maker)):
        return ()  # a sum is one number for all that it sums: no channel of its own
    if maker.op in ("linear", "convolution"):
        return _trained(graph, maker.inputs[1])
    if maker.op in ("add", "residual"):
        summands = (name for name in maker.inputs if name not in graph.parameters)
        parts = [_factors(graph, name, growing, known) for name in summands]
        return tuple(role for role in parts[0] if all(role in part for part in parts)) if parts else ()
    read = (maker.inputs[slot] for slot in lookup(maker).entrywise)
    return tuple(role for name in read for role in _factors(graph, name, growing, known))
