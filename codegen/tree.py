"""The tree of modules of a model: which class is called from where, in what order, with which tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass
from functools import cached_property

from widthwise.codegen.fusion import TOKENS, Call, Plan, calls
from widthwise.codegen.layout import Path, blocks, containers, contiguous, home
from widthwise.derive.errors import DeriveError
from widthwise.derive.graph import Graph, Node

STATEFUL = frozenset({"conv1d", "scan", "attention"})  # what carries something from token to token

Unit = str | Path
"""A call, by its output, or a module that is called as a whole."""


@dataclass(frozen=True)
class Tree:
    """A graph as modules. A path is that of a container; ``("layers", "*")`` at its end is an entry of a list."""

    graph: Graph
    multiplied: frozenset[str]

    @cached_property
    def where(self) -> Mapping[str, Path]:
        return {name: tuple(path.split(".")) if path else () for name, path in containers(self.graph).items()}

    @cached_property
    def calls(self) -> Mapping[str, Call]:
        plan = Plan(self.graph, {name: ".".join(path) for name, path in self.where.items()}, self.multiplied)
        return {name: call for name, call in calls(plan).items() if call.kind not in ("input", "cross_entropy")}

    @cached_property
    def read(self) -> Mapping[str, tuple[str, ...]]:
        """The tensors that each call takes, without parameters."""
        return {
            name: tuple(each for each in call.takes if each not in self.graph.parameters)
            for name, call in self.calls.items()
        }

    @cached_property
    def logits(self) -> str:
        """What the loss is taken of.

        Raises:
            DeriveError: unless there is one loss.
        """
        losses = [node for node in self.graph.ordered if node.op == "cross_entropy"]
        if len(losses) != 1:
            raise DeriveError(f"{self.graph.name} has {len(losses)} losses", cure="a model has one")
        return losses[0].inputs[0]

    @cached_property
    def blocks(self) -> Mapping[Path, tuple[str, str]]:
        """The input and the output of each repeated block.

        Raises:
            DeriveError: for a block that is not one module.
        """
        found = blocks(self.graph)
        if len(found) != len(self.graph.carries):
            start, end = next(
                carry for carry in self.graph.carries if carry not in {each[:2] for each in found.values()}
            )
            raise DeriveError(f"the block {start} → {end} has no parameters", cure="leave it out, or give it some")
        for path, (_, end, _) in found.items():
            if self.outputs(path) != (end,):
                inner = ", ".join(name for name in self.outputs(path) if name != end)
                raise DeriveError(f"{inner} is read outside of {'.'.join(path)}", cure=f"read {end}, its output, alone")
        return {path: (start, end) for path, (start, end, _) in found.items()}

    @cached_property
    def paths(self) -> tuple[Path, ...]:
        """Every class's path, inner ones first."""
        homes = {home(parameter) for parameter in self.graph.parameters.values()}
        filled = homes | set(self.where.values())
        closed = {path[:end] for path in filled for end in range(len(path) + 1)}
        lists = {path[:-1] for path in closed if path and path[-1] == "*"}
        if odd := sorted(lists & filled):
            raise DeriveError(f"{'.'.join(odd[0])} is a list and has something of its own", cure="name either anew")
        order = {path: place for place, path in enumerate(self.where[name] for name in self.calls)}
        return tuple(sorted(closed - lists, key=lambda path: (-len(path), order.get(path, -1), path)))

    def members(self, path: Path) -> tuple[str, ...]:
        """The calls inside of a container."""
        return tuple(name for name in self.calls if self.where[name][: len(path)] == path)

    def runs(self, path: Path) -> bool:
        """Whether a container is called as one module; otherwise it holds parameters alone."""
        inside = {name for name, at in self.where.items() if at[: len(path)] == path}
        return bool(inside) and (path[-1:] == ("*",) or contiguous(self.graph, inside))

    def stateful(self, path: Path) -> bool:
        return any(self.calls[name].kind in STATEFUL for name in self.members(path))

    def inputs(self, path: Path) -> tuple[str, ...]:
        """The tensors that a container reads and does not make; a block's own input first."""
        made = set(self.members(path))
        read = dict.fromkeys(name for each in self.members(path) for name in self.read[each] if name not in made)
        start = next((start for start, end in self.graph.carries if end in made and start in read), "")
        return tuple(sorted(read, key=lambda name: name != start) if path[-1:] == ("*",) else read)

    def outputs(self, path: Path) -> tuple[str, ...]:
        """The tensors that a container makes and others read."""
        made = self.members(path)
        elsewhere = {name for other, read in self.read.items() if other not in set(made) for name in read}
        return tuple(name for name in made if name in elsewhere or name == self.logits)

    def reads(self, unit: Unit) -> tuple[str, ...]:
        return self.read[unit] if isinstance(unit, str) else self.inputs(unit)

    def writes(self, unit: Unit) -> tuple[str, ...]:
        return (unit,) if isinstance(unit, str) else self.outputs(unit)

    def units(self, path: Path) -> tuple[Unit, ...]:
        """What a container's forward pass calls, each after what it reads.

        Raises:
            DeriveError: when modules need each other's outputs.
        """
        found = list(dict.fromkeys(self._unit(name, path) for name in self.members(path)))
        missing = {name for unit in found for name in self.writes(unit)}
        ordered: list[Unit] = []
        while found:
            unit = next((unit for unit in found if missing.isdisjoint(self.reads(unit))), None)
            if unit is None:
                stuck = ", ".join(".".join(each) for each in found if not isinstance(each, str))
                raise DeriveError(f"the modules {stuck} need each other's outputs", cure="name their parameters apart")
            found.remove(unit)
            missing -= set(self.writes(unit))
            ordered.append(unit)
        return tuple(ordered)

    def _unit(self, name: str, path: Path) -> Unit:
        at = self.where[name]
        inner = (at[:end] for end in range(len(path) + 1, len(at) + 1))
        return next((each for each in inner if each in set(self.paths) and self.runs(each)), name)

    def first_reader(self, role: str) -> Node:
        """The node that a parameter belongs to.

        Raises:
            DeriveError: when nothing reads it.
        """
        readers = [node for node in self.graph.ordered if role in node.inputs]
        if not readers:
            raise DeriveError(f"nothing reads the parameter {role!r}", cure="leave it out")
        return readers[0]


def class_names(tree: Tree, title: str, taken: Iterable[str]) -> Mapping[Path, str]:
    """A class name for every path but the root."""
    names: dict[Path, str] = {}
    used = set(taken)
    for path in tree.paths:
        if not path:
            continue
        name = _class_name(tree, path, title)
        around = [part for part in path[:-1] if part != "*"]
        while name in used:  # qualified by what it is part of
            name = camel(around.pop()) + name if around else f"{name}_"
        used.add(name)
        names[path] = name
    return names


def _class_name(tree: Tree, path: Path, title: str) -> str:
    direct = {tree.calls[name].kind for name in tree.calls if tree.where[name] == path}
    if path[-1] == "*":
        return camel(path[-2].removesuffix("s"))
    if "scan" in direct:
        return title
    return "Attention" if "attention" in direct else _READABLE.get(path[-1], camel(path[-1]))


_READABLE = {"mlp": "MLP", "ffn": "FFN", "model": "Backbone", "attn": "Mixer"}


def camel(name: str) -> str:
    """``gated_deltanet`` as ``GatedDeltanet``."""
    return "".join(part[:1].upper() + part[1:] for part in name.split("_"))


def identifiers(tree: Tree, check: Callable[[str, str], None], reserved: Set[str]) -> Mapping[str, str]:
    """A local variable for every tensor: the author's name, or that of a parameter it is made with, or its op's."""
    graph = tree.graph
    names = {TOKENS: "tokens"}
    used = {*reserved, *graph.named}
    for node in graph.ordered:
        if node.output in graph.named:
            check(node.output, node.where)
            name = node.output
            while name in reserved or name in names.values():
                name += "_"
            names[node.output] = name
            continue
        made_with = [name for name in node.inputs if name in graph.parameters]
        base = made_with[0] if made_with else {"einsum": "product"}.get(node.op, node.op)
        name, count = base, 1
        while name in used:
            count += 1
            name = f"{base}_{count}"
        used.add(name)
        names[node.output] = name
    return names
