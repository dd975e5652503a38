"""What the parametrization template is filled with: rules, axes, places of multipliers and norm epsilons."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from widthwise.codegen.layout import containers
from widthwise.codegen.text import call, number, power, quoted
from widthwise.derive import Graph, RuleTable
from widthwise.derive.errors import DeriveError
from widthwise.derive.exponents import ONE, ZERO
from widthwise.derive.graph import Dim, Node, Parameter, Rows, atoms, base_axis
from widthwise.derive.laws import SYMMETRIC
from widthwise.derive.table import Rule

NORMS = ("rms_norm", "layer_norm", "l2_norm")


@dataclass(frozen=True)
class Row:
    """One entry of a table in the file: a comment that says why, and the entry."""

    why: str
    call: str


def context(graph: Graph, table: RuleTable) -> dict[str, Any]:
    """The template's variables.

    Raises:
        DeriveError: when a rule has no place in a model, or the graph no axis that is its width.
    """
    rules = [(rule, graph.parameters[rule.role]) for rule in table.rules if rule.role in graph.parameters]
    axes = list({dim: None for _, parameter in rules for dim in atoms(parameter.shape)})
    _check_channels(rules)
    return {
        "rules": [_rule(rule, parameter, _taps(graph, parameter)) for rule, parameter in rules],
        "axes": axes,
        "width_axis": width_axis(axes),
        "multipliers": _multipliers(graph, table),
        "norms": _norms(graph, table),
        "laws": SYMMETRIC,
        "has_eps": any(rule.eps is not None for rule, _ in rules),
        "packed": any(parameter.rows is not None for _, parameter in rules),
        "input_first": any(parameter.input_first for _, parameter in rules),
        "largest": any(rule.lr_log is not None for rule, _ in rules),
        "taps": any(_taps(graph, parameter) for _, parameter in rules),
    }


def _check_channels(rules: Sequence[tuple[Rule, Parameter]]) -> None:
    """Groups read the number of channels off a parameter's shape."""
    groups = {str(group) for _, parameter in rules for group in parameter.shape}
    for rule, parameter in rules:
        if rule.channels and rule.channels not in groups:
            raise DeriveError(
                f"the learning rate of {rule.role} depends on the size of {rule.channels}, which no parameter has",
                where=parameter.where,
                cure="derive with --assume at-init, and sweep the learning rate again at several times the width",
            )


def _taps(graph: Graph, parameter: Parameter) -> int:
    """How many axes before the last count as inputs too: those of a dense convolution."""
    dense = any(node.op == "convolution" for node, _ in graph.consumers(parameter.role))
    return len(parameter.shape) - 2 if dense else 0


def _name(pattern: str, rows: Rows | None) -> str:
    if rows is None:
        return quoted(pattern)
    sizes, exponents = (_listed(map(each, values)) for each, values in ((str, rows.sizes), (number, rows.exponents)))
    axis = f", axis={rows.axis}" if rows.axis else ""
    return f"Packed({quoted(pattern)}, {rows.index}, ({sizes}), ({exponents}), {rows.width}{axis})"


def _listed(texts: Iterable[str]) -> str:
    each = list(texts)
    return ", ".join(each) + ("," if len(each) == 1 else "")


def _rule(rule: Rule, parameter: Parameter, taps: int) -> Row:
    names = _listed(_name(pattern, parameter.rows) for pattern in parameter.patterns)
    law = parameter.law
    arguments = [quoted(rule.role), f"({names})", quoted(", ".join(map(str, parameter.shape))), quoted(law.name)]
    if law.high > law.low:
        arguments += [f"low={law.low!r}", f"high={law.high!r}"]
    for knob in ("init_std", "lr", "weight_decay", "eps"):
        value = getattr(rule, knob)
        if value is not None and (value != ZERO or knob in ("lr", "eps")):
            arguments.append(f"{knob}={number(value)}")
    if rule.lr_log is not None:
        arguments += [f"lr_log={number(rule.lr_log)}", f"channels={quoted(rule.channels)}"]
    if parameter.input_first:
        arguments.append("input_first=True")
    if taps:
        arguments.append(f"taps={taps}")
    return Row(rule.binding if parameter.trainable else f"frozen; {rule.binding}", call("Rule", arguments, 4))


def width_axis(dims: list[Dim]) -> str:
    """The first axis that grows as the width itself: ``d_model`` of a language model, the units of an MLP."""
    for dim in sorted(dims, key=lambda dim: dim.name != "width"):  # what a tracer calls the axis that it was given
        if dim.exponent == ONE:
            return dim.name
    raise DeriveError("no axis grows as n^1, so that nothing says what the width is", cure="give one axis exponent 1")


def _multipliers(graph: Graph, table: RuleTable) -> list[Row]:
    where = containers(graph)
    rules = {rule.role: rule for rule in table.rules}
    rows = []
    for node in graph.ordered:
        role, carrier = _carried(graph, node), node.attrs.get("carrier")
        if role is None or (exponent := rules[role].multiplier) is None:
            continue
        if exponent == ZERO and not carrier:
            continue  # a factor of one needs no place, but where another gauge may have left one
        name = role if node.op == "scale" else f"{role}_multiplier"
        path = ".".join(filter(None, (where[node.output], name)))
        arguments = [quoted(role), f"({quoted(path)},)", number(exponent)]
        if (axis := base_axis(graph, node)) is not None:
            arguments.append(f"base_axis={quoted(str(axis))}")
        rows.append(Row(f"{power(exponent)}. {_because(rules[role])}", call("Multiplier", arguments, 4)))
    return rows


def _carried(graph: Graph, node: Node) -> str | None:
    """The role whose multiplier a node applies."""
    if node.attrs.get("carrier"):
        return str(node.attrs["carrier"])
    if node.op in ("linear", "conv1d"):
        return node.inputs[1]
    return node.inputs[0] if node.op == "embedding" else None


def _norms(graph: Graph, table: RuleTable) -> list[Row]:
    scales = {str(node.attrs["carrier"]): node for node in graph.nodes if node.op == "scale" and node.attrs["carrier"]}
    rows = []
    for rule in table.rules:
        if rule.norm_eps is not None and rule.norm_eps != ZERO:
            norm = next(node for node, _ in graph.consumers(scales[rule.role].output) if node.op in NORMS)
            arguments = [quoted(_gain_of(graph, norm)), number(rule.norm_eps)]
            rows.append(Row(f"{power(rule.norm_eps)}. {_because(rule)}", call("NormEps", arguments, 4)))
    return rows


def _gain_of(graph: Graph, norm: Node) -> str:
    """The role of the gain that multiplies a norm's output: what a norm without a name of its own is known by."""
    for reader, _ in graph.consumers(norm.output):
        for name in reader.inputs:
            if name in graph.parameters:
                return name
    raise DeriveError(
        f"the eps of {norm.output} must scale, and without a gain it is no module",
        where=norm.where,
        cure="give the norm a gain, or use --gauge multiplier",
    )


def _because(rule: Rule) -> str:
    """Why a rule's multiplier is what it is."""
    parts = rule.binding.split("; ")
    return "; ".join(part.removeprefix("multiplier: ") for part in parts if not part.startswith(("init_std:", "lr:")))
