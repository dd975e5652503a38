"""The proof of a rule as numbered steps, each resting on earlier ones."""

from __future__ import annotations

from widthwise.derive.errors import DeriveError
from widthwise.derive.exponents import n_to, show
from widthwise.derive.table import RuleTable


def proof_lines(table: RuleTable, role: str) -> list[str]:
    """The proof of one rule, a line a step: what has which size, why, from which steps, under which assumption.

    Raises:
        DeriveError: for an unknown role, or a table that was read from a file and carries no proofs.
    """
    rule = table.rule(role)
    if role not in table.prove:
        raise DeriveError(f"this table carries no proof of {role!r}", cure="derive it again: files keep rules only")
    numbers: dict[int, int] = {}
    lines: list[str] = []
    for number, fact in enumerate(table.prove[role](), 1):
        numbers[id(fact)] = number
        resting = sorted({numbers[id(parent)] for parent in fact.parents})
        source = f" (from {', '.join(map(str, resting))})" if resting else ""
        assumed = f" [assumed: {'; '.join(sorted(fact.assumed))}]" if fact.assumed else ""
        lines.append(f"{number:3d}. {fact.subject} ~ {n_to(fact.value)}: {fact.because}{source}{assumed}")
    lines.append("")
    lines.append(
        f"Hence for {role} under {table.optimizer}: "
        + ", ".join(
            f"{knob} {n_to(value)}"
            for knob in ("init_std", "multiplier", "lr", "weight_decay", "eps", "norm_eps")
            if (value := getattr(rule, knob)) is not None
        )
        + (
            "."
            if rule.lr_log is None
            else f"; lr (ln {rule.channels})^{show(rule.lr_log)} besides, weight_decay its inverse."
        )
    )
    return lines
