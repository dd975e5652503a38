"""The typed graph: dimensions with exponents, tensors, parameters, nodes, over a networkx MultiDiGraph.

Batch and time are width-free and common to every activation, so they are left implicit: a tensor is what one
token carries, with its width-dependent (and other) axes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sympy import Expr

from widthwise.derive.errors import DeriveError
from widthwise.derive.exponents import ZERO
from widthwise.derive.laws import NORMAL, Law

if TYPE_CHECKING:
    import networkx as nx


@dataclass(frozen=True)
class Dim:
    """One axis: |axis| = Θ(n^exponent).

    ``practical`` is the largest size this axis has at the widths people train; a coherence that takes over only
    on longer axes than that is left to the asymptotic regime.
    """

    name: str
    exponent: Expr
    practical: int = 4096

    def __mul__(self, other: Dim | Group) -> Group:
        return Group((self,)) * other

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Group:
    """Several axes laid out as one, such as heads × head dim: what a projection's rows are."""

    dims: tuple[Dim, ...]

    def __mul__(self, other: Dim | Group) -> Group:
        return Group(self.dims + as_group(other).dims)

    def __str__(self) -> str:
        return "*".join(dim.name for dim in self.dims)


Shape = tuple[Group, ...]


def as_group(axis: Dim | Group) -> Group:
    """A lone axis as a group of one."""
    return axis if isinstance(axis, Group) else Group((axis,))


def atoms(shape: Shape) -> tuple[Dim, ...]:
    """The single axes of a shape, in order."""
    return tuple(dim for group in shape for dim in group.dims)


def extent(dims: tuple[Dim, ...]) -> Expr:
    """The exponent of the number of entries along these axes."""
    return sum((dim.exponent for dim in dims), ZERO)


def shape_text(shape: Shape) -> str:
    return f"[{', '.join(map(str, shape))}]"


@dataclass(frozen=True)
class Rows:
    """Where real models pack a role into a larger tensor: part ``index`` of what is repeated along ``axis``.

    The parts have ``sizes`` entries at the width ``width``, and grow as the ``exponents`` say.
    """

    index: int
    sizes: tuple[int, ...]
    exponents: tuple[Expr, ...]
    width: int
    axis: int = 0


@dataclass(frozen=True)
class Parameter:
    """A trainable tensor of one role; ``patterns`` are globs over the names it has in real models.

    ``law`` is how it is drawn at the base width; weights are symmetric, while gains, biases and decay rates have a
    fixed or one-sided value. ``rows`` is set where real models hold it as part of a larger tensor, and ``input_first``
    where they hold it as [in, out…], with its last axis first.
    """

    role: str
    shape: Shape
    patterns: tuple[str, ...] = ()
    law: Law = NORMAL
    trainable: bool = True
    where: str = ""
    rows: Rows | None = None
    input_first: bool = False


@dataclass(frozen=True)
class Node:
    """One application of an op. Inputs and output are tensor names; parameters are tensors too."""

    op: str
    inputs: tuple[str, ...]
    output: str
    shape: Shape
    attrs: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    where: str = ""


@dataclass(frozen=True)
class Graph:
    """A whole architecture. ``named`` are the tensors the author named, which is what tables list; ``carries`` are
    the (input, output) tensors of each repeated block; ``title`` is what generated classes are named after."""

    name: str
    nodes: tuple[Node, ...]
    parameters: Mapping[str, Parameter]
    shapes: Mapping[str, Shape]
    named: tuple[str, ...]
    options: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    carries: tuple[tuple[str, str], ...] = ()
    title: str = ""

    @cached_property
    def network(self) -> nx.MultiDiGraph:
        """Nodes are tensors; an edge leads from each input of an op to its output, with the node and the slot."""
        import networkx as nx  # a fifth of a second, and a graph written in order never needs it

        network = nx.MultiDiGraph()
        for node in self.nodes:
            network.add_node(node.output)
            for slot, source in enumerate(node.inputs):
                network.add_edge(source, node.output, node=node, slot=slot)
        return network

    @cached_property
    def ordered(self) -> tuple[Node, ...]:
        """The nodes, each after everything it reads.

        Raises:
            DeriveError: when the graph has a cycle, names a tensor that nothing makes, or makes one twice.
        """
        makers: dict[str, Node] = {}
        for node in self.nodes:
            if node.output in makers or node.output in self.parameters:
                raise DeriveError(f"tensor {node.output!r} is made twice", where=node.where, cure="rename one of them")
            makers[node.output] = node
        in_order, made = True, set(self.parameters)
        for node in self.nodes:
            for source in node.inputs:
                if source not in makers and source not in self.parameters:
                    raise DeriveError(
                        f"{node.op} reads {source!r}, which nothing makes",
                        where=node.where,
                        cure="add it with Builder.input or Builder.parameter",
                    )
            in_order = in_order and made.issuperset(node.inputs)
            made.add(node.output)
        return self.nodes if in_order else self._sorted(makers)

    def _sorted(self, makers: Mapping[str, Node]) -> tuple[Node, ...]:
        import networkx as nx

        place = {node.output: index for index, node in enumerate(self.nodes)}
        try:  # by place in the description where there is a choice, so that proofs read in the author's order
            order = list(nx.lexicographical_topological_sort(self.network, key=lambda name: place.get(name, -1)))
        except nx.NetworkXUnfeasible:
            cycle = [edge[0] for edge in nx.find_cycle(self.network)]
            raise DeriveError(
                f"the graph has a cycle through {' → '.join(cycle)}",
                where=makers[cycle[0]].where,
                cure="a recurrence over time is the scan op, not a cycle",
            ) from None
        return tuple(makers[name] for name in order if name in makers)

    def consumers(self, tensor: str) -> tuple[tuple[Node, int], ...]:
        """Each (node, input slot) that reads the tensor."""
        return self._readers.get(tensor, ())

    @cached_property
    def _readers(self) -> Mapping[str, tuple[tuple[Node, int], ...]]:
        readers: dict[str, tuple[tuple[Node, int], ...]] = {}
        for node in self.nodes:
            for slot, source in enumerate(node.inputs):
                readers[source] = (*readers.get(source, ()), (node, slot))
        return readers

    @cached_property
    def makers(self) -> Mapping[str, Node]:
        """The node that makes each tensor."""
        return {node.output: node for node in self.nodes}


def base_axis(graph: Graph, node: Node) -> Group | None:
    """The axis whose size^(-1/2) at the base width is the base value of a node's multiplier; None where that is 1."""
    base = str(node.attrs.get("base") or "")
    if base == "fan_in":
        return graph.shapes[node.inputs[1]][-1]
    dims = {dim.name: dim for shape in graph.shapes.values() for dim in atoms(shape)}
    return Group(tuple(dims[name] for name in base.split("*"))) if base else None
