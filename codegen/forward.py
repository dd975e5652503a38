"""The forward pass of one module: the calls of a container as statements, with the graph's tensor names."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from widthwise.codegen.expressions import Code, called, statement
from widthwise.codegen.fusion import TOKENS
from widthwise.codegen.layout import Path
from widthwise.codegen.ops import expression
from widthwise.codegen.text import WIDTH
from widthwise.codegen.tree import Unit
from widthwise.codegen.values import Values
from widthwise.derive.graph import Dim

INLINE = 80  # characters of an unnamed tensor's expression that may stand inside of another


@dataclass
class Forward(Values):
    """Writes one forward pass: ``lines`` are its statements, ``returns`` is what they end with."""

    lines: list[str] = field(default_factory=list)
    returns: str = ""

    def __post_init__(self) -> None:
        self._outputs = self.tree.outputs(self.path)
        self.variables |= {name: self.names.variables[name] for name in self.inputs}
        units = self.tree.units(self.path)
        self._readers = Counter(name for unit in units for name in self.tree.reads(unit))
        self._readers.update(self._outputs)
        for unit in units:
            self._loops(unit)
        self._returned = self.variables.get(self._outputs[0], self.names.variables[self._outputs[0]])
        self._declared = {self.names.variables[name] for name in self.inputs}
        for unit in units:
            self._write(unit)
        self.returns = ", ".join(self.value(name, narrow=True).text for name in self._outputs)

    @property
    def arguments(self) -> tuple[str, ...]:
        return tuple(self.names.variables[name] for name in self.inputs)

    @property
    def summary(self) -> str:
        """Shapes of inputs and outputs."""
        given = ", ".join(self._shaped(name) for name in self.inputs)
        return f"{given} → {', '.join(self._shaped(name) for name in self._outputs)}"

    def _shaped(self, name: str) -> str:
        axes = "" if name == TOKENS else "".join(f", {self._axes(group.dims)}" for group in self.graph.shapes[name])
        return f"{self.names.variables[name]} [B, T{axes}]"

    def _axes(self, dims: tuple[Dim, ...]) -> str:
        return "·".join(self.names.sizes[dim] for dim in dims)

    # -- statements -----------------------------------------------------------------------------------------------

    def _write(self, unit: Unit) -> None:
        if isinstance(unit, str):
            self._call(unit)
        elif unit[-1] == "*":
            self._loop(unit)
        else:
            self._assign(list(self.tree.outputs(unit)), called(self.module(unit), *self._given(unit)))

    def _call(self, name: str) -> None:
        node, call = self.graph.makers[name], self.tree.calls[name]
        waiting = dict(self.pending)
        code = expression(self, node, call)
        once = self._readers[name] == 1 and name not in self._outputs and name not in self.graph.named
        if once and len(code.text) <= INLINE:
            self.pending[name] = code
            return
        used = [each for each in waiting if each not in self.pending]
        if used and code.call is None and len(code.text) + len(self.names.variables[name]) + 20 > WIDTH:
            for each in used:  # too long for a line: what stands inside gets variables
                self._assign([each], waiting[each])
            code = expression(self, node, call)
        self._assign([name], code)

    def _assign(self, tensors: list[str], code: Code) -> None:
        targets = [self.variables.setdefault(name, self.names.variables[name]) for name in tensors]
        if code.wide:
            self.wide.update(tensors)
        target = ", ".join(targets)
        if target == self._returned and target not in self._declared:
            target += ": Tensor"  # modules return Any
        self._declared.update(targets)
        if target != code.text:
            self.lines += statement(target, code).split("\n")

    def _given(self, unit: Path) -> tuple[str, ...]:
        given = [self.value(name, narrow=True).text for name in self.tree.inputs(unit)]
        return tuple(given + ["cache"] * self.tree.stateful(unit))

    def _loops(self, unit: Unit) -> None:
        """A block's output goes by the name of its input, where nothing else reads that."""
        if isinstance(unit, str) or unit[-1] != "*":
            return
        start, end = self.tree.blocks[unit]
        if self._readers[start] == 1:
            self.variables[end] = self.names.variables[start]

    def _loop(self, unit: Path) -> None:
        start, end = self.tree.blocks[unit]
        one = unit[-2].removesuffix("s") or "layer"
        entering = self.value(start, narrow=True)
        if entering.text != self.variables.get(end):
            self._assign([end], entering)
        x = self.variables[end]
        rest = [self.value(name, narrow=True).text for name in self.tree.inputs(unit)[1:]]
        state = ["cache"] * self.tree.stateful(unit)
        lead = " " * 12
        self.lines.append(f"        for {one} in {self.module(unit[:-1])}:")
        again = called("checkpointing.checkpoint", one, x, *rest, "use_reentrant=False", "preserve_rng_state=False")
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
