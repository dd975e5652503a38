"""Knobs fixed by the request: a whole parametrization by name, or any subset by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from sympy import Expr

from widthwise.derive.errors import DeriveError, unknown_name
from widthwise.derive.exponents import HALF, ZERO, exponent, largest
from widthwise.derive.graph import Graph, atoms, extent
from widthwise.derive.ops.weights import operator_norm
from widthwise.derive.solve import INIT, MULTIPLIER
from widthwise.derive.update import LR

Fixed = Mapping[tuple[str, str], Expr]
Convention = Callable[[Expr, Expr], tuple[Expr, Expr]]
"""(fan-in, fan-out exponents) → (init std, multiplier) of a weight."""

# How each parametrization is *defined* (Everett et al. 2024, arXiv:2407.05872, Table 1), from the two fans alone:
# standard and NTK make W·x Θ(1) for independent signs, mean-field and μP for aligned ones.
PARAMETRIZATIONS: Mapping[str, Convention] = {
    "standard": lambda fan_in, fan_out: (-fan_in * HALF, ZERO),
    "ntk": lambda fan_in, fan_out: (ZERO, -fan_in * HALF),
    "mean-field": lambda fan_in, fan_out: (ZERO, -operator_norm(fan_in, fan_out)),
    "mup": lambda fan_in, fan_out: (
        -largest((fan_in, fan_out)) * HALF,
        -operator_norm(fan_in, fan_out) + largest((fan_in, fan_out)) * HALF,
    ),
}


def fixed_knobs(graph: Graph, parametrization: str | None, by_hand: Mapping[str, str | int | Expr] | None) -> Fixed:
    """All knobs a request fixes, by (knob, role).

    Raises:
        DeriveError: for names that do not exist.
    """
    fixed: dict[tuple[str, str], Expr] = {}
    if parametrization is not None:
        if parametrization not in PARAMETRIZATIONS:
            raise unknown_name("parametrization", parametrization, list(PARAMETRIZATIONS))
        fixed |= _by_convention(graph, PARAMETRIZATIONS[parametrization])
    carriers = {str(node.attrs["carrier"]) for node in graph.nodes if node.attrs.get("carrier")}
    for name, value in (by_hand or {}).items():
        role, _, knob = name.rpartition(".")
        if role not in graph.parameters and role not in carriers:
            raise unknown_name("role", role or name, sorted(set(graph.parameters) | carriers))
        if knob not in (INIT, MULTIPLIER, LR):
            raise unknown_name("knob to fix", knob, [INIT, MULTIPLIER, LR])
        if knob != MULTIPLIER and role not in graph.parameters:
            raise DeriveError(f"{role} has no {knob} to fix", cure=f"it has a multiplier: {role}.{MULTIPLIER}")
        if knob == MULTIPLIER and role not in carriers and not _is_weight(graph, role):
            raise DeriveError(f"{role} has no {knob} to fix", cure="only weights and scale ops have multipliers")
        fixed[knob, role] = exponent(value)
    return fixed


def _is_weight(graph: Graph, role: str) -> bool:
    return any(node.op in ("linear", "conv1d", "embedding") for node, _ in graph.consumers(role))


def _by_convention(graph: Graph, convention: Convention) -> dict[tuple[str, str], Expr]:
    fixed: dict[tuple[str, str], Expr] = {}
    for role, parameter in graph.parameters.items():
        ops = {node.op for node, _ in graph.consumers(role)}
        if ops == {"linear"}:
            fan_in, fan_out = extent(atoms(parameter.shape[-1:])), extent(atoms(parameter.shape[:-1]))
        elif "embedding" in ops:  # a look-up reads one row: fan-in one
            fan_in, fan_out = ZERO, extent(atoms(parameter.shape[1:]))
        else:
            continue
        fixed[INIT, role], fixed[MULTIPLIER, role] = convention(fan_in, fan_out)
    return fixed
