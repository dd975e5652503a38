"""What expressions of one module are made of: tensors in variables, parameters, sizes, modules inside of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from widthwise.codegen.expressions import ATOM, Code
from widthwise.codegen.fusion import TOKENS
from widthwise.codegen.layout import Path, module_of
from widthwise.codegen.tree import Tree
from widthwise.derive.errors import DeriveError
from widthwise.derive.graph import Dim, Graph, Node, shape_text


@dataclass(frozen=True)
class Names:
    """What things are called: local variables by tensor, attributes of multipliers by the tensor they are applied to,
    sizes by axis, lengths of lists of layers and classes by path."""

    variables: Mapping[str, str]
    multipliers: Mapping[str, str]
    sizes: Mapping[Dim, str]
    depths: Mapping[Path, str]
    titles: Mapping[Path, str]


@dataclass
class Values:
    """Looks up what a module's forward pass computes with. ``sizes``, ``helpers`` and ``eps`` keep what that takes of
    the constructor and of the file; ``wide`` are variables of at least single precision in a model of any dtype."""

    tree: Tree
    names: Names
    path: Path
    variables: dict[str, str] = field(default_factory=dict)
    pending: dict[str, Code] = field(default_factory=dict)
    wide: set[str] = field(default_factory=set)
    sizes: dict[str, None] = field(default_factory=dict)
    helpers: set[str] = field(default_factory=set)
    eps: bool = False

    @property
    def graph(self) -> Graph:
        return self.tree.graph

    @property
    def inputs(self) -> tuple[str, ...]:
        return self.tree.inputs(self.path)

    def value(self, name: str, narrow: bool = False) -> Code:
        """A tensor: in a variable, still an expression, or a parameter. Parameters used entrywise are wide, in at
        least single precision; ``narrow`` brings what came of them back to the model's dtype."""
        if name in self.graph.parameters:
            self.helpers.add("wide")
            code = Code(f"_wide({self.parameter(name)})", wide=True)
        elif name in self.pending:
            code = self.pending.pop(name)
        else:
            code = Code(self.variables[name], wide=name in self.wide)
        if narrow and code.wide:
            return Code(f"{code.within(ATOM)}.to({self.like}.dtype)")
        return code

    @property
    def like(self) -> str:
        """A tensor in the model's dtype: the first input, or the table that tokens are looked up in."""
        if activations := [self.names.variables[name] for name in self.inputs if name != TOKENS]:
            return activations[0]
        inside = self.tree.members(self.path)
        return self.parameter(next(self.graph.makers[name].inputs[0] for name in inside if self.looks_up(name)))

    def looks_up(self, name: str) -> bool:
        return self.graph.makers[name].op == "embedding"

    def parameter(self, role: str) -> str:
        parts = self.graph.parameters[role].patterns[0].split(".")
        return self.attribute(tuple(parts), role)

    def module(self, path: Path) -> str:
        return self.attribute(path, ".".join(path))

    def attribute(self, path: Path, what: str) -> str:
        inside = path[len(self.path) :]
        if path[: len(self.path)] != self.path or "*" in inside:
            place = ".".join(self.path) or "the root"
            raise DeriveError(f"{what} cannot be reached from {place}", cure="share weights within a block")
        return "self." + ".".join(inside)

    def size(self, dim: Dim) -> str:
        name = self.names.sizes[dim]
        self.sizes[name] = None
        return f"self.{name}"

    def bias_of(self, weight: str) -> str | None:
        """The role of the bias in the same layer."""
        path = module_of(self.graph.parameters[weight])
        others = [role for role, each in self.graph.parameters.items() if role != weight and module_of(each) == path]
        return next((role for role in others if self.own_module(weight) and role == f"{path[-1]}_bias"), None)

    def own_module(self, role: str) -> bool:
        return module_of(self.graph.parameters[role])[-1:] == (role,)

    def own(self, node: Node, role: str) -> bool:
        """Whether a parameter is in a layer of its own, made for this node."""
        return self.own_module(role) and self.tree.first_reader(role).op == node.op

    def expect(self, node: Node, holds: bool, what: str) -> None:
        if not holds:
            given = ", ".join(shape_text(self.graph.shapes[name]) for name in node.inputs)
            raise DeriveError(
                f"{node.op} {node.output!r} of {given} cannot be emitted: it needs {what}",
                where=node.where,
                cure="describe it so, or generate the parametrization alone",
            )
