"""Channels in which several trained factors multiply, and what the largest of n of them does to a learning rate.

One channel of a sum Σ_c Π_i x_{i,c} is a product of p factors, each trained by its own optimizer step. Where the step
is the gradient, a factor grows as fast as its fellows are large, dx_i/dt ∝ Π_{j≠i} x_j, so that a channel whose factors
begin at x₀ gets away (p ≥ 3; p is the product's degree) after a time ∝ x₀^-(p-2). The largest of N normal draws begins
√(2 ln N) typical ones high. What it takes for no channel to get away sooner in a wider model is a learning rate
∝ (ln N)^-(p-2)/2: no power of n, so no size of this engine's shows it. An optimizer whose step has its own size does
not see it.

That is the limit of many channels. What nonlinearities between the factors make of it at the widths people train is
integrated (:mod:`widthwise.derive.escape`). And where the channel that got away carries the whole sum, that does ask
for a power of n (:mod:`widthwise.derive.carrier`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from sympy import Expr

from widthwise.derive import carrier
from widthwise.derive.escape import limit, power
from widthwise.derive.exponents import ZERO, smallest
from widthwise.derive.gaussian import FUNCTIONS
from widthwise.derive.graph import Dim, Graph, Group, Node, atoms, extent
from widthwise.derive.ops.einsum import summed
from widthwise.derive.ops.registry import lookup
from widthwise.derive.product import Applied, Factor, Product, factors, product, within_bounds


@dataclass(frozen=True)
class Channels:
    """Channels that are summed in ``at``, along ``summed``; ``axes`` are these and those that they lie beside, such as
    heads, which compete to be the first; and what multiplies in each."""

    at: str
    axes: Group
    product: Product
    summed: Group

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that have a trained factor of their own in each channel."""
        return tuple(dict.fromkeys(factor.role for factor in factors(self.product)))

    @property
    def told(self) -> str:
        """What multiplies in each, in words."""
        roles = ", ".join(self.roles)
        return f"{len(self.roles)} trained factors ({roles}) multiply in each of the N channels of {self.axes}"

    @property
    def counted(self) -> Expr:
        """The exponent of ln N by which the learning rates of these roles have to scale where N is large, told by the
        product's degree alone: -(p-2)/2, 0 for p ≤ 2."""
        return limit(self.product)

    @property
    def integrated(self) -> Expr:
        """The same exponent at the widths people train, from the products' own flow."""
        return power(self.product)

    @property
    def carried(self) -> Expr:
        """The exponent of n by which the same learning rates have to scale once one channel has got away and carries
        the sum alone: -(1-2/p) of that of the terms that one sum has, 0 where many share it or it has as many at every
        width. (One of a head's terms carries what its head sums, not what others do.)"""
        terms = extent(self.summed.dims)
        return carrier.power(self.product) * terms if terms != ZERO else ZERO

    @property
    def share(self) -> float:
        """What part of what training adds to their sum one of a few hundred has."""
        return carrier.share(self.product)


def channels(graph: Graph) -> tuple[Channels, ...]:
    """Wherever channels are summed of which a wider model has more, the factors that multiply in each."""
    return tuple(_summed(graph))


@dataclass(frozen=True)
class Slower:
    """How much slower these channels need a role to be: by (ln N)^power, or by n^power where one carries their sum."""

    channels: Channels
    power: Expr


def slower(graph: Graph, integrate: bool = False, but: Collection[str] = ()) -> dict[str, Slower]:
    """For each role but some what the channels that ask most of its learning rate ask, where any ask something: the
    exponent of ln N."""
    return _most(graph, (lambda each: each.integrated) if integrate else (lambda each: each.counted), but)


def carried(graph: Graph) -> dict[str, Slower]:
    """The same for those of which one carries their sum: the exponent of n."""
    return _most(graph, lambda each: each.carried)


def _most(graph: Graph, asks: Callable[[Channels], Expr], but: Collection[str] = ()) -> dict[str, Slower]:
    found: dict[str, Slower] = {}
    for each in channels(graph):
        roles = [role for role in each.roles if role not in but]
        asked = Slower(each, asks(each) if roles else ZERO)
        for role in roles if asked.power != ZERO else ():
            before = found.setdefault(role, asked)
            power = smallest((before.power, asked.power))
            if power != before.power:
                found[role] = Slower(each, power)
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


_Known = dict[tuple[str, frozenset[Dim]], Product]
"""Factors by tensor and growing axes: what several read is traced back once."""


def _summed(graph: Graph) -> Iterator[Channels]:
    known: _Known = {}
    for node in graph.ordered:
        dims, over, weight, met = _contraction(graph, node)
        if growing := _grow(dims):
            parts = (_factors(graph, name, growing, known) for name in met)
            found = within_bounds(product(*_own(graph, weight), *parts))
            yield Channels(node.output, Group(dims), found, Group(over))


def _contraction(graph: Graph, node: Node) -> tuple[tuple[Dim, ...], tuple[Dim, ...], str, tuple[str, ...]]:
    """The channels that a node sums (with the axes they lie beside, such as heads), the axes that it sums, the weight
    that it sums them with, and the activations that have them."""
    shapes = graph.shapes
    if node.op in ("linear", "convolution"):
        x, weight = node.inputs
        inputs = shapes[weight][-1:] if node.op == "linear" else shapes[weight][1:2]
        return atoms(inputs), atoms(inputs), weight, (x,)
    if node.op == "scan":
        keys = atoms(shapes[node.inputs[0]])
        return keys, tuple(dim for dim in keys if dim not in atoms(node.shape)), "", node.inputs[:2]
    if node.op == "einsum":
        one, other = (atoms(shapes[name]) for name in node.inputs)
        if over := summed_by(graph, node):
            beside = set(one) & set(other)
            return tuple(dim for dim in dict.fromkeys(one + other) if dim in beside.union(over)), over, "", node.inputs
    return (), (), "", ()


def summed_by(graph: Graph, node: Node) -> tuple[Dim, ...]:
    """The axes that a product of two activations sums."""
    one, other = (graph.shapes[name] for name in node.inputs)
    return summed(one, other, node.shape)


def _grow(dims: tuple[Dim, ...]) -> frozenset[Dim]:
    return frozenset(dim for dim in dims if dim.exponent != ZERO)


def _trained(graph: Graph, name: str) -> tuple[str, ...]:
    parameter = graph.parameters.get(name)
    return (name,) if parameter is not None and parameter.trainable else ()


def _own(graph: Graph, role: str, tensor: str = "") -> tuple[Factor, ...]:
    """The factor that a parameter has in each channel, or in each of the tensor that it makes; none where frozen."""
    return tuple(Factor(name, tensor or name, graph.parameters[name].law) for name in _trained(graph, role))


def _factors(graph: Graph, tensor: str, growing: frozenset[Dim], known: _Known) -> Product:
    """The trained factors of a tensor's channels, back to the linear maps that make them. A sum has the factors that
    all it adds have in common (biases aside, which begin at zero): a residual stream, none."""
    if (tensor, growing) not in known:
        known[tensor, growing] = _traced(graph, tensor, growing, known)
    return known[tensor, growing]


def _traced(graph: Graph, tensor: str, growing: frozenset[Dim], known: _Known) -> Product:
    if not growing <= set(atoms(graph.shapes[tensor])):
        return Product()
    if tensor in graph.parameters:
        return product(*_own(graph, tensor))
    maker: Node | None = graph.makers.get(tensor)
    if maker is None or (maker.op == "einsum" and summed_by(graph, maker)):
        return Product()  # a sum is one number for all that it sums: no channel of its own
    if maker.op in ("linear", "convolution"):
        return product(*_own(graph, maker.inputs[1], tensor))
    if maker.op in ("add", "residual"):
        return _common([_factors(graph, name, growing, known) for name in maker.inputs if name not in graph.parameters])
    parts = product(*(_factors(graph, maker.inputs[slot], growing, known) for slot in lookup(maker).entrywise))
    return within_bounds(product(Applied(maker.op, parts)) if maker.op in FUNCTIONS and parts else parts)


def _common(parts: list[Product]) -> Product:
    """What summands share: of one, all; of several, what they multiply by alike, functions and all, and of the rest
    the factors whose roles they all have, without what is done to these, which differs."""
    if len(parts) < 2:
        return product(*parts)
    alike = Counter(parts[0].parts)
    for part in parts[1:]:
        alike &= Counter(part.parts)
    rest = [factors(Product(tuple((Counter(part.parts) - alike).elements()))) for part in parts]
    roles = [{factor.role for factor in each} for each in rest]
    return product(*alike.elements(), *(each for each in rest[0] if all(each.role in has for has in roles)))
