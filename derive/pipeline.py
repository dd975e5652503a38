"""The whole derivation, as one sentence."""

from __future__ import annotations

from collections.abc import Mapping

from sympy import Expr

from widthwise.derive.assume import Assumptions, assumptions, in_regime
from widthwise.derive.backward import Backward
from widthwise.derive.findings import collect, other_branch
from widthwise.derive.forward import walk_forward
from widthwise.derive.gauge import absorbed
from widthwise.derive.graph import Graph
from widthwise.derive.lasting import lasting
from widthwise.derive.optimizers import optimizer as law_of
from widthwise.derive.parametrization import Fixed, fixed_knobs
from widthwise.derive.rules import assemble
from widthwise.derive.table import RuleTable
from widthwise.derive.update import solve_updates


def derive(
    graph: Graph,
    optimizer: str = "adamw",
    assume: str | Assumptions | None = None,
    *,
    preset: str | None = None,
    regime: str | None = None,
    parametrization: str | None = None,
    fix: Mapping[str, str | int | Expr] | None = None,
    gauge: str = "multiplier",
) -> RuleTable:
    """Derive how every knob of every parameter must scale with width.

    Args:
        graph: a description (Builder.build() or architecture(name)).
        optimizer: sgd, adam, adamw, lion, muon, adafactor.
        assume: an assumption set, by name or as an object; ``preset`` names that of a publication instead.
        regime: ``practical`` (below the crossovers), ``asymptotic`` (past them) or ``throughout`` (as practical, with,
            of each role, the smallest learning rate that holds at any time in training).
        parametrization: fix init and multipliers as standard, ntk, mean-field or mup have them; solve the rest.
        fix: knobs given by hand, ``{"a_proj.init_std": "-1/2"}``; the rest is solved around them.
        gauge: ``multiplier`` keeps multipliers in the forward pass; ``absorbed`` moves them into init, learning
            rate and norm eps wherever a single weight can take them.

    Raises:
        DeriveError: when the description, the request or both have no derivation.
    """
    assumed = assumptions(assume, preset, regime)
    fixed = fixed_knobs(graph, parametrization, fix)
    table = _one_regime(graph, optimizer, assumed, fixed, gauge)
    past = in_regime(assumed, "asymptotic")
    if "asymptotic" in assumed.regimes and past != assumed:
        table = table.with_findings(other_branch(table, _one_regime(graph, optimizer, past, fixed, gauge)))
    return table


def _one_regime(graph: Graph, optimizer: str, assumed: Assumptions, fixed: Fixed, gauge: str) -> RuleTable:
    law = law_of(optimizer)
    forward = walk_forward(graph, assumed, fixed)
    backward = Backward(forward).run()
    updates = solve_updates(backward, law, fixed)
    if assumed.regime == "throughout":
        updates = lasting(backward, updates, law, fixed)
    rules = assemble(backward, law, updates)
    return RuleTable.of(
        backward, optimizer, absorbed(backward, law, rules, gauge), collect(backward, updates, law), gauge
    )
