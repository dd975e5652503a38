"""What the rules of the tracer work with: the axes of every traced tensor first, then the engine's nodes.

Two passes over the sites. The first learns the axes of every tensor, which later calls still refine; the second, when
all is known, writes one node of the engine's graph for each call and each piece of a packed tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from types import MappingProxyType
from typing import Any

from widthwise.derive.errors import DeriveError
from widthwise.derive.graph import Dim, Group, Node, Parameter, Rows, Shape, atoms, shape_text
from widthwise.derive.laws import NORMAL, Law
from widthwise.derive.ops import OPS
from widthwise.verify.trace.axes import Axis, Dimension, Piece, Sizes, identify, new, pieces
from widthwise.verify.trace.names import Names
from widthwise.verify.trace.sites import Site

Key = frozenset[tuple[Axis, Sizes]]
Value = dict[Key, str]
"""A traced tensor in the engine's graph: one tensor for each piece of what is packed in it."""


@dataclass(frozen=True)
class Rule:
    """How a call is traced: the dimensions of its outputs, and the values of its outputs."""

    axes: Callable[[Axes, Site], list[list[Dimension]]]
    emit: Callable[[Emitter, Site], list[Value]]


RULES: dict[str, Rule] = {}


def rule(*names: str, axes: Callable[[Axes, Site], list[list[Dimension]]]) -> Callable[..., Any]:
    """Register the emission of some calls, by full name (``aten.mul.Tensor``) or without overload (``aten.mul``)."""

    def register(emit: Callable[[Emitter, Site], list[Value]]) -> Callable[[Emitter, Site], list[Value]]:
        RULES.update(dict.fromkeys(names, Rule(axes, emit)))
        return emit

    return register


@dataclass
class Axes:
    """The first pass."""

    widths: int
    known: dict[Site, list[list[Dimension]]] = field(default_factory=dict)
    cuts: dict[Site, tuple[list[Dimension], list[int]]] = field(default_factory=dict)
    heads: list[Dimension] = field(default_factory=list)

    def of(self, value: Any) -> list[Dimension]:
        """The dimensions of a call's (first) output."""
        return self.known[value][0]

    def fresh(self, shape: Sequence[Sizes], origin: str = "", weight: bool = False) -> list[Dimension]:
        return [new(sizes, f"{origin}_d{at}" if origin else "", weight) for at, sizes in enumerate(shape)]

    def broadcast(self, *operands: list[Dimension]) -> list[Dimension]:
        """Dimensions of an entrywise op: aligned from the right, and the same where none is of size one."""
        rank = max(map(len, operands))
        out: list[Dimension] = []
        for at in range(rank):
            present = [each[at - rank] for each in operands if rank - at <= len(each) and each[at - rank]]
            for other in present[1:]:
                identify(present[0], other)
            out.append(present[0] if present else [])
        return out


@dataclass
class Emitter:
    """The second pass: collects the engine's graph."""

    axes: Axes
    names: Names
    widths: tuple[int, ...]
    readouts: Mapping[Site, str]
    values: dict[Site, list[Value]] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    shapes: dict[str, Shape] = field(default_factory=dict)
    named: list[str] = field(default_factory=list)
    parameters: dict[str, Parameter] = field(default_factory=dict)
    ancestors: dict[str, frozenset[str]] = field(default_factory=dict)
    readers: dict[Site, list[Site]] = field(default_factory=dict)

    # -- tensors and their pieces ------------------------------------------------------------------------------

    def value(self, site: Any) -> Value:
        return self.values[site][0]

    def dims(self, site: Any) -> list[Dimension]:
        return self.axes.of(site)

    def keys(self, dimensions: Sequence[Dimension]) -> list[tuple[Key, tuple[Piece, ...]]]:
        """Each way to choose one piece of every dimension."""
        return [
            (frozenset(piece.key for piece in chosen if piece.key is not None), chosen)
            for chosen in product(*(pieces(each) for each in dimensions))
        ]

    def pick(self, site: Site, value: Value, key: Key) -> str:
        """The tensor of the piece that ``key`` chooses."""
        for mine, name in value.items():
            if mine <= key:
                return name
        raise site.refuse("pieces of a packed tensor meet others")

    def whole(self, site: Site, source: Site, what: str) -> str:
        """The one tensor of a call's output that is not packed."""
        value = self.value(source)
        if len(value) != 1:
            raise site.refuse(f"{what} of a tensor that is packed of {len(value)} pieces")
        return next(iter(value.values()))

    def shape(self, chosen: Iterable[Piece], present: Iterable[Dim] | None = None) -> Shape:
        """The engine's shape: a group for each dimension, of the axes that are ``present``; tokens left out."""
        kept = None if present is None else set(present)
        groups = [
            tuple(dim for dim in map(self.names.dim, piece.axes) if kept is None or dim in kept) for piece in chosen
        ]
        return tuple(Group(group) for group in groups if group)

    def grouped(self, site: Site, name: str, chosen: Iterable[Piece]) -> str:
        """A tensor with its axes grouped as the call sees them."""
        mine = self.shapes[name]
        wanted = self.shape(chosen, atoms(mine))
        if mine == wanted:
            return name
        if atoms(mine) != atoms(wanted):
            raise site.refuse(f"{name} {shape_text(mine)} is read with its axes in another order, {shape_text(wanted)}")
        return self.apply(site, "reshape", (name,), shape=wanted)

    # -- nodes -------------------------------------------------------------------------------------------------

    def apply(self, site: Site, op: str, inputs: Sequence[str], name: str = "", **attrs: Any) -> str:
        """Add a node; its output's name."""
        output = self.names.unique(name or site.name)
        try:
            shape = OPS[op].shape([self.shapes[each] for each in inputs], attrs)
        except DeriveError as error:
            raise site.refuse(error.what, error.cure) from None
        where = f"{site.module}, {site.where}" if site.module and site.where else site.module or site.where
        self.nodes.append(Node(op, tuple(inputs), output, shape, MappingProxyType(dict(attrs)), where))
        self.shapes[output] = shape
        self.ancestors[output] = frozenset(inputs).union(*(self.ancestors.get(each, frozenset()) for each in inputs))
        if name:
            self.named.append(output)
        return output

    def each(self, site: Site, make: Callable[[Key, tuple[Piece, ...]], str]) -> list[Value]:
        """A value made piece by piece of the output."""
        return [{key: make(key, chosen) for key, chosen in self.keys(self.dims(site))}]

    def entrywise(self, site: Site, op: str, **attrs: Any) -> list[Value]:
        """One node of one input for each piece."""
        source = site.inputs[0]
        return self.each(
            site, lambda key, _: self.apply(site, op, (self.pick(site, self.value(source), key),), **attrs)
        )

    def scaled(self, site: Site, source: Site, values: Sequence[float]) -> list[Value]:
        """A number times a tensor; one leaves it as it is."""
        if set(values) == {1.0}:
            return self.each(site, lambda key, _: self.pick(site, self.value(source), key))
        power = self.names.power(tuple(abs(each) for each in values), site)
        attrs = {"power": power, "carrier": None, "factor": float(values[0]) if power == 0 else 1.0}
        return self.each(
            site, lambda key, _: self.apply(site, "scale", (self.pick(site, self.value(source), key),), **attrs)
        )

    # -- parameters --------------------------------------------------------------------------------------------

    def parameter(self, site: Site) -> list[Value]:
        """The roles of a parameter: one, or one for each range of its rows."""
        found: Value = {}
        every = self.keys(self.dims(site))
        for index, (key, chosen) in enumerate(every):
            packed = [at for at, piece in enumerate(chosen) if piece.key is not None]
            if len(packed) > 1:
                raise site.refuse(f"{site.names[0]} is packed along two of its axes")
            rows = self._rows(site, packed[0], index) if packed else None
            role = self.names.role(site, index if packed else None)
            self.parameters[role] = Parameter(
                role, self.shape(chosen), self.names.patterns(site), NORMAL, site.trainable, site.names[0], rows
            )
            self.shapes[role] = self.parameters[role].shape
            found[key] = role
        return [found]

    def _rows(self, site: Site, axis: int, index: int) -> Rows:
        sizes = [piece.extent for piece in pieces(self.dims(site)[axis])]
        exponents = [self.names.exponent(each, f"part of {site.names[0]}") for each in sizes]
        return Rows(index, tuple(each[0] for each in sizes), tuple(exponents), self.widths[0], axis)

    def law(self, name: str, law: Law) -> None:
        """Say how a parameter is drawn, from how it is used first."""
        if name in self.parameters and name not in self.ancestors:
            self.ancestors[name] = frozenset()
            self.parameters[name] = replace(self.parameters[name], law=law)

    def stored(self, site: Site, name: str, input_first: bool) -> None:
        """Say that a matrix is stored as [in, out], before its law is said; or hold that it is not.

        Raises:
            DeriveError: when it is used both ways.
        """
        parameter = self.parameters[name]
        if parameter.input_first == input_first:
            return
        if parameter.input_first or name in self.ancestors:
            raise site.refuse(f"{site.module} uses {parameter.where} transposed, and another call does not")
        shape = (*parameter.shape[1:], parameter.shape[0])
        self.parameters[name] = replace(parameter, shape=shape, input_first=True)
        self.shapes[name] = shape
