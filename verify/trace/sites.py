"""Traced calls: one :class:`Site` for each node of the exported graphs, the same node at every width."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.fx import Node

from widthwise.derive.errors import DeriveError
from widthwise.verify.trace.axes import Sizes

Kind = Literal["op", "parameter", "buffer", "input", "output"]


@dataclass(eq=False)
class Site:
    """One call. In ``args`` and ``kwargs``, tensors are sites and numbers that depend on the width are ``Varying``.

    ``shapes`` are those of the outputs, a size for each width in each place; ``module`` is the path of the module that
    made the call, ``where`` the line it was made in; ``names`` are a parameter's names.
    """

    name: str
    op: str
    kind: Kind
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    shapes: list[list[Sizes]] = field(default_factory=list)
    where: str = ""
    module: str = ""
    names: tuple[str, ...] = ()
    trainable: bool = True
    number: bool = True  # a floating-point tensor
    constant: bool = False  # depends on no parameter and no floating-point input

    @property
    def shape(self) -> list[Sizes]:
        return self.shapes[0]

    @property
    def inputs(self) -> list[Site]:
        return list(tensors((self.args, self.kwargs)))

    def refuse(self, what: str, cure: str = "") -> DeriveError:
        """An error that names the call, its module and its line."""
        if self.kind == "parameter":
            return DeriveError(what, where=self.names[0], cure=cure or "read it in ops that have rules, or a stand-in")
        at = f"{self.op} in {self.module or 'the model'}" + (f", {self.where}" if self.where else "")
        return DeriveError(what, where=at, cure=cure or "write this part in ops that have rules, or as a stand-in")


@dataclass(frozen=True)
class Varying:
    """A number that has another value at another width."""

    values: tuple[float, ...]


CONSTANT = ("zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones", "new_empty", "new_full")
"""Calls that take nothing but a shape from their input."""


def tensors(value: Any) -> Iterator[Site]:
    """Every site in nested arguments."""
    if isinstance(value, Site):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors(each)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))


def replaced(value: Any, by: Callable[[Site], Site]) -> Any:
    """Nested arguments with other sites in them."""
    if isinstance(value, Site):
        return by(value)
    if isinstance(value, list | tuple):
        return type(value)(replaced(each, by) for each in value)
    if isinstance(value, dict):
        return {key: replaced(each, by) for key, each in value.items()}
    return value


def numbers(value: float | Varying, widths: int) -> tuple[float, ...]:
    """A number at each width."""
    return value.values if isinstance(value, Varying) else (value,) * widths


def aligned(programs: Sequence[torch.export.ExportedProgram], modules: Sequence[torch.nn.Module]) -> list[Site]:
    """The nodes of all programs, one site each.

    Raises:
        DeriveError: where the programs are not the same sequence of calls.
    """
    graphs = [list(program.graph.nodes) for program in programs]
    for nodes in zip(*graphs, strict=False):
        if len({(node.op, str(node.target) if node.op == "call_function" else "") for node in nodes}) > 1:
            calls = " and ".join(dict.fromkeys(str(node.target) for node in nodes))
            raise DeriveError(
                f"the model calls {calls} at the same place, depending on its width",
                where=_line(nodes[0]),
                cure="trace at widths between which control flow does not change",
            )
    if len({len(graph) for graph in graphs}) > 1:
        raise DeriveError("the model makes more calls at one width than at another", cure="keep its depth fixed")
    aliases: dict[int, list[str]] = {}
    for name, parameter in modules[0].named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    parameters = dict(modules[0].named_parameters(remove_duplicate=False))
    signature = programs[0].graph_signature
    sites: dict[str, Site] = {}
    for nodes in zip(*graphs, strict=True):
        site = _site(nodes, sites)
        if site.kind == "input" and site.name in signature.inputs_to_parameters:
            parameter = parameters[signature.inputs_to_parameters[site.name]]
            site.kind, site.names = "parameter", tuple(aliases[id(parameter)])
            site.trainable, site.op = parameter.requires_grad, "parameter"
        elif site.kind == "input" and site.name in signature.inputs_to_buffers:
            site.kind, site.names = "buffer", (signature.inputs_to_buffers[site.name],)
            site.op = "buffer"
        made_of_nothing = site.op.split(".")[1:2] and site.op.split(".")[1] in CONSTANT
        site.constant = bool(made_of_nothing) or {
            "parameter": False,
            "buffer": True,
            "input": not site.number,
        }.get(site.kind, all(each.constant for each in site.inputs))
        sites[site.name] = site
    return list(sites.values())


def _site(nodes: Sequence[Node], known: dict[str, Site]) -> Site:
    first = nodes[0]
    kind: Kind = "op" if first.op == "call_function" else "output" if first.op == "output" else "input"
    values = [node.meta.get("val") for node in nodes]
    outputs = [_flat(value) for value in values]
    shapes = [
        [tuple(each[at].shape[dim] for each in outputs) for dim in range(len(output.shape))]
        for at, output in enumerate(outputs[0])
    ]
    stack = list((first.meta.get("nn_module_stack") or {}).values())
    path = stack[-1][0] if stack else ""
    return Site(
        first.name,
        _op_name(first) if kind == "op" else kind,
        kind,
        _merged([node.args for node in nodes], known),
        _merged([node.kwargs for node in nodes], known),
        shapes,
        _line(first),
        re.sub(r"L\['self'\]\.?|@\d+", "", path),
        number=bool(outputs[0]) and all(each.dtype.is_floating_point for each in outputs[0]),
    )


def _flat(value: Any) -> list[Any]:
    if isinstance(value, list | tuple):
        return [each for each in value if isinstance(each, torch.Tensor)]
    return [value] if isinstance(value, torch.Tensor) else []


def _op_name(node: Node) -> str:
    """``aten.mul.Tensor``; the mark of an in-place call is left to aliasing."""
    name = str(node.target)
    return "getitem" if name == "<built-in function getitem>" else name


def _merged(values: Sequence[Any], known: dict[str, Site]) -> Any:
    first = values[0]
    if isinstance(first, Node):
        return known.get(first.name, first.name)
    if isinstance(first, list | tuple):
        merged = [_merged(each, known) for each in zip(*values, strict=True)]
        return tuple(merged) if isinstance(first, tuple) else merged
    if isinstance(first, dict):
        return {key: _merged([each[key] for each in values], known) for key in first}
    if isinstance(first, int | float) and not isinstance(first, bool) and len(set(values)) > 1:
        return Varying(tuple(values))
    return first


def _line(node: Node) -> str:
    """file:line of the innermost call outside of torch."""
    found = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    own = [(file, line) for file, line in found if "/torch/" not in file.replace("\\", "/")]
    return "{}:{}".format(re.split(r"[/\\]", own[-1][0])[-1], own[-1][1]) if own else ""
