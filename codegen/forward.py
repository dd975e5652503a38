"""The forward pass of one module: the calls of a container as statements, with the graph's tensor names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite

from widthwise.codegen.expressions import (
    ATOM,
    Code,
    called,
    negative,
    product,
    product_of,
    regrouped,
    root,
    statement,
    total,
)
from widthwise.codegen.fusion import Call
from widthwise.codegen.layout import Path, module_of
from widthwise.codegen.text import WIDTH
from widthwise.codegen.tree import Tree, Unit
from widthwise.derive.errors import DeriveError
from widthwise.derive.exponents import ZERO
from widthwise.derive.graph import Dim, Node, Shape, shape_text

FUNCTIONS: Mapping[str, str] = {
    "silu": "F.silu",
    "gelu": "F.gelu",
    "relu": "F.relu",
    "tanh": "torch.tanh",
    "sigmoid": "torch.sigmoid",
    "softplus": "F.softplus",
    "exp": "torch.exp",
}
INLINE = 72  # characters of an unnamed tensor's expression that may stand inside of another


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
class Forward:
    """Writes one forward pass; afterwards ``lines`` are its statements, and ``sizes``, ``helpers`` and ``eps`` say what
    they need of the constructor and of the file."""

    tree: Tree
    names: Names
    path: Path
    lines: list[str] = field(default_factory=list)
    sizes: dict[str, None] = field(default_factory=dict)
    helpers: set[str] = field(default_factory=set)
    eps: bool = False

    def __post_init__(self) -> None:
        self._graph = self.tree.graph
        self._inputs = self.tree.inputs(self.path)
        self._outputs = self.tree.outputs(self.path)
        self._units = self.tree.units(self.path)
        self._variables = {name: self.names.variables[name] for name in self._inputs}
        self._pending: dict[str, Code] = {}
        self._wide: set[str] = set()
        self._readers = Counter(name for unit in self._units for name in self.tree.reads(unit))
        self._readers.update(self._outputs)
        for unit in self._units:
            self._loops(unit)
        self._returned = self._variables.get(self._outputs[0], self.names.variables[self._outputs[0]])
        self._declared = {self.names.variables[name] for name in self._inputs}
        for unit in self._units:
            self._write(unit)
        self.returns = ", ".join(self._value(name, narrow=True).text for name in self._outputs)

    @property
    def arguments(self) -> tuple[str, ...]:
        return tuple(self.names.variables[name] for name in self._inputs)

    @property
    def summary(self) -> str:
        """Shapes of inputs and outputs."""
        given = ", ".join(self._shaped(name) for name in self._inputs)
        return f"{given} → {', '.join(self._shaped(name) for name in self._outputs)}"

    def _shaped(self, name: str) -> str:
        axes = "" if name == "tokens" else "".join(f", {self._axes(group.dims)}" for group in self._graph.shapes[name])
        return f"{self.names.variables[name]} [B, T{axes}]"

    def _axes(self, dims: tuple[Dim, ...]) -> str:
        return "·".join(self.names.sizes[dim] for dim in dims)

    # -- statements -----------------------------------------------------------------------------------------------

    def _write(self, unit: Unit) -> None:
        if isinstance(unit, str):
            code = self._code(self._graph.makers[unit], self.tree.calls[unit])
            once = self._readers[unit] == 1 and unit not in self._outputs and unit not in self._graph.named
            if once and len(code.text) <= INLINE:
                self._pending[unit] = code
            else:
                self._assign([unit], code)
        elif unit[-1] == "*":
            self._loop(unit)
        else:
            self._assign(list(self.tree.outputs(unit)), called(self._module(unit), *self._given(unit)))

    def _assign(self, tensors: list[str], code: Code) -> None:
        targets = [self._variables.setdefault(name, self.names.variables[name]) for name in tensors]
        if code.wide:
            self._wide.update(tensors)
        target = ", ".join(targets)
        if target == self._returned and target not in self._declared:
            target += ": Tensor"  # modules return Any
        self._declared.update(targets)
        if target != code.text:
            self.lines += statement(target, code).split("\n")

    def _given(self, unit: Path) -> tuple[str, ...]:
        given = [self._value(name, narrow=True).text for name in self.tree.inputs(unit)]
        return tuple(given + ["cache"] * self.tree.stateful(unit))

    def _loops(self, unit: Unit) -> None:
        """A block's output goes by the name of its input, where nothing else reads that."""
        if isinstance(unit, str) or unit[-1] != "*":
            return
        start, end = self.tree.blocks[unit]
        if self._readers[start] == 1:
            self._variables[end] = self.names.variables[start]

    def _loop(self, unit: Path) -> None:
        start, end = self.tree.blocks[unit]
        one = unit[-2].removesuffix("s") or "layer"
        if self._variables.get(end) != self._variables.get(start):
            self._assign([end], self._value(start))
        x = self._variables[end]
        rest = [self._value(name, narrow=True).text for name in self.tree.inputs(unit)[1:]]
        state = ["cache"] * self.tree.stateful(unit)
        lead = " " * 12
        self.lines.append(f"        for {one} in {self._module(unit[:-1])}:")
        again = called("checkpointing.checkpoint", one, x, *rest, "use_reentrant=False")
        plain = called(one, x, *rest, *state)
        chosen = f"self.checkpoint{' and cache is None' if state else ''}"
        either = f"{lead}{x} = {again.text} if {chosen} else {plain.text}"
        if len(either) <= WIDTH:
            self.lines.append(either)
        else:
            branches = (f"if {chosen}:", again), ("else:", plain)
            for condition, code in branches:
                self.lines += [lead + condition, *statement(x, code, 16).split("\n")]
        self.helpers.add("checkpoint")

    # -- values ---------------------------------------------------------------------------------------------------

    def _value(self, name: str, narrow: bool = False) -> Code:
        """A tensor: in a variable, still an expression, or a parameter. Parameters used entrywise are wide, in at
        least single precision; ``narrow`` brings what came of them back to the model's dtype."""
        if name in self._graph.parameters:
            self.helpers.add("wide")
            code = Code(f"_wide({self._parameter(name)})", wide=True)
        elif name in self._pending:
            code = self._pending.pop(name)
        else:
            code = Code(self._variables[name], wide=name in self._wide)
        like = next((self.names.variables[each] for each in self._inputs if each != "tokens"), None)
        if narrow and code.wide and like:
            return Code(f"{code.within(ATOM)}.to({like}.dtype)")
        return code

    def _parameter(self, role: str) -> str:
        parts = self._graph.parameters[role].patterns[0].split(".")
        return self._attribute(tuple(parts), role)

    def _module(self, path: Path) -> str:
        return self._attribute(path, ".".join(path))

    def _attribute(self, path: Path, what: str) -> str:
        inside = path[len(self.path) :]
        if path[: len(self.path)] != self.path or "*" in inside:
            place = ".".join(self.path) or "the root"
            raise DeriveError(f"{what} cannot be reached from {place}", cure="share weights within a block")
        return "self." + ".".join(inside)

    def _size(self, dim: Dim) -> str:
        name = self.names.sizes[dim]
        self.sizes[name] = None
        return f"self.{name}"

    # -- calls ----------------------------------------------------------------------------------------------------

    def _code(self, node: Node, call: Call) -> Code:
        write = getattr(self, f"_{call.kind}", None)
        if call.kind in FUNCTIONS:
            return called(FUNCTIONS[call.kind], (x := self._value(node.inputs[0])).text, wide=x.wide)
        if write is None:
            raise DeriveError(
                f"{call.kind} {node.output!r} cannot be emitted",
                where=node.where,
                cure="generate its parametrization, which needs no model of ours",
            )
        code: Code = write(node, call)
        factor = self.names.multipliers.get(node.output)
        return product(code, Code(f"self.{factor}")) if factor else code

    def _embedding(self, node: Node, call: Call) -> Code:
        (table,) = node.inputs
        self._expect(node, len(self._graph.shapes[table]) == 2, "a table of two axes")
        if self._own(node, table):
            return called(self._module(module_of(self._graph.parameters[table])), "tokens")
        return called("F.embedding", "tokens", self._parameter(table))

    def _linear(self, node: Node, call: Call) -> Code:
        inner = self._graph.makers[call.absorbed[0]] if call.absorbed else node
        weight = inner.inputs[1]
        self._expect(node, len(self._graph.shapes[weight]) == 2, "a weight of two axes")
        x = self._value(inner.inputs[0], narrow=True).text
        if self._own(inner, weight) and bool(call.absorbed) == (self.bias_of(weight) is not None):
            return called(self._module(module_of(self._graph.parameters[weight])), x)
        bias = [self._parameter(node.inputs[1])] if call.absorbed else []
        return called("F.linear", x, self._parameter(weight), *bias)

    def bias_of(self, weight: str) -> str | None:
        """The role of the bias in the same layer."""
        path = module_of(self._graph.parameters[weight])
        others = [role for role, each in self._graph.parameters.items() if role != weight and module_of(each) == path]
        return next((role for role in others if self._own_module(weight) and role == f"{path[-1]}_bias"), None)

    def _own_module(self, role: str) -> bool:
        return module_of(self._graph.parameters[role])[-1:] == (role,)

    def _own(self, node: Node, role: str) -> bool:
        """Whether a parameter is in a layer of its own, made for this node."""
        return self._own_module(role) and self.tree.first_reader(role).op == node.op

    def _conv1d(self, node: Node, call: Call) -> Code:
        x, weight = node.inputs
        fits = len(self._graph.shapes[weight]) == 2 and self._own(node, weight)
        self._expect(node, fits, "one axis of channels and taps of its own")
        self.helpers.add("conv")
        return called(
            self._module(module_of(self._graph.parameters[weight])), self._value(x, narrow=True).text, "cache"
        )

    def _norm(self, node: Node, call: Call) -> Code:
        norm, gain = self._graph.makers[node.inputs[0]], node.inputs[1]
        x = self._value(call.reads[0], narrow=True).text
        if self._own_module(gain):
            self.helpers.add(norm.op)
            return called(self._module(module_of(self._graph.parameters[gain])), x)
        self.eps = True
        size = product_of(norm.attrs["axis"], self._size)
        return called(f"F.{norm.op}", x, f"({size},)", f"weight={self._parameter(gain)}", "eps=self.norm_eps")

    def _rms_norm(self, node: Node, call: Call) -> Code:
        self.eps = True
        size = product_of(node.attrs["axis"], self._size)
        return called(f"F.{node.op}", self._value(node.inputs[0], narrow=True).text, f"({size},)", "eps=self.norm_eps")

    _layer_norm = _rms_norm

    def _l2_norm(self, node: Node, call: Call) -> Code:
        self.helpers.add("l2")
        return called("_l2_normalized", self._value(node.inputs[0], narrow=True).text, repr(float(node.attrs["eps"])))

    def _add(self, node: Node, call: Call) -> Code:
        return total(*(self._regrouped(name, node.shape) for name in node.inputs))

    _residual = _add

    def _scale(self, node: Node, call: Call) -> Code:
        self._expect(node, node.attrs["power"] == ZERO, "a factor without a power of the width")
        return self._scaled(node, self._value(node.inputs[0]))

    def _scaled(self, node: Node, x: Code) -> Code:
        factor = float(node.attrs["factor"])
        self._expect(node, isfinite(factor), "a finite factor")
        if factor == -1.0:
            return negative(x)
        return x if factor == 1.0 else product(x, Code(repr(factor)))

    def _reshape(self, node: Node, call: Call) -> Code:
        return self._regrouped(node.inputs[0], node.shape)

    def _regrouped(self, name: str, shape: Shape) -> Code:
        return regrouped(self._value(name), self._graph.shapes[name], shape, self._size)

    def _einsum(self, node: Node, call: Call) -> Code:
        sides = [self._graph.shapes[name] for name in node.inputs]
        groups = dict.fromkeys(group for side in (*sides, node.shape) for group in side)
        distinct = [dim for group in groups for dim in group.dims]
        regular = len(distinct) == len(set(distinct)) and all(len(side) == len(set(side)) for side in sides)
        self._expect(node, regular or sides == [node.shape] * 2, "axes that are grouped alike, each once")
        a, b = (self._value(name) for name in node.inputs)
        bare = [self._bare(name) for name in node.inputs]
        if all([group for group in node.shape if group in side] == list(side) for side in sides):
            a, b = (
                _broadcast(code, side, node.shape, alone) for code, side, alone in zip((a, b), sides, bare, strict=True)
            )
            return product(a, b)
        letter = {group: chr(ord("a") + place) for place, group in enumerate(groups)}
        left, right = (
            ("" if alone else "...") + "".join(letter[group] for group in side)
            for side, alone in zip(sides, bare, strict=True)
        )
        out = ("" if all(bare) else "...") + "".join(letter[group] for group in node.shape)
        return called("torch.einsum", f'"{left},{right}->{out}"', a.text, b.text, wide=a.wide or b.wide)

    def _bare(self, name: str) -> bool:
        """Whether a tensor comes of parameters alone, and has no axes of batch and time."""
        if name in self._graph.parameters:
            return True
        maker = self._graph.makers[name]
        return maker.op not in ("input", "embedding") and all(self._bare(source) for source in maker.inputs)

    def _scan(self, node: Node, call: Call) -> Code:
        q, k, v, *gates = call.reads
        decay = "None"
        if node.attrs["decay"]:
            decay = self._value(gates.pop(0)).text
            decay = f"{call.log_of_decay}({decay})" if call.log_of_decay else decay
        keys = product_of(self._graph.shapes[node.inputs[1]][-1], self._size) if node.attrs.get("key_scale") else ""
        self.helpers.add("scan")
        return called(
            "_scanned",
            *(self._value(name, narrow=True).text for name in (q, k, v)),
            decay,
            self._value(gates[0]).text,
            f"scale={root(keys) if keys else '1.0'}",
            *["normalize_qk=True"] * call.normalize,
            "cache=cache",
            f'key=(self, "{self.names.variables[node.output]}")',
        )

    def _attention(self, node: Node, call: Call) -> Code:
        scale = self._graph.makers[call.absorbed[1]]
        self._expect(scale, scale.attrs["power"] == ZERO, "a factor without a power of the width")
        factor = Code("1.0") if scale.attrs["factor"] == 1.0 else self._scaled(scale, Code("1.0"))
        if carrier := self.names.multipliers.get(scale.output):
            factor = self._scaled(scale, Code(f"self.{carrier}"))
        self.helpers.add("attention")
        return called(
            "_attended",
            *(self._value(name, narrow=True).text for name in call.reads),
            f"scale={factor.text}",
            "cache=cache",
            f'key=(self, "{self.names.variables[node.output]}")',
        )

    def _expect(self, node: Node, holds: bool, what: str) -> None:
        if not holds:
            given = ", ".join(shape_text(self._graph.shapes[name]) for name in node.inputs)
            raise DeriveError(
                f"{node.op} {node.output!r} of {given} cannot be emitted: it needs {what}",
                where=node.where,
                cure="describe it so, or generate the parametrization alone",
            )


def _broadcast(code: Code, side: Shape, out: Shape, bare: bool) -> Code:
    """A factor with the axes it lacks as axes of size one."""
    index = [":" if group in side else "None" for group in out]
    for needless in ["None", ":"] if bare else [":"]:  # PyTorch lines axes up from the last one
        while index and index[0] == needless:
            index.pop(0)
    if not index:
        return code
    return Code(f"{code.within(ATOM)}[{', '.join(['...', *index])}]", wide=code.wide)
