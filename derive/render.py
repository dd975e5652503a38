"""Tables for people: terminal (rich), Markdown, LaTeX. JSON and TOML are for programs (see toml_io)."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from sympy import Expr, latex

from widthwise.derive.exponents import n_to, show
from widthwise.derive.table import Rule, RuleTable

if TYPE_CHECKING:
    from rich.console import RenderableType

COLUMNS = (
    ("init std", "init_std"),
    ("multiplier", "multiplier"),
    ("lr", "lr"),
    ("weight decay", "weight_decay"),
    ("eps", "eps"),
    ("norm eps", "norm_eps"),
)


def columns(table: RuleTable) -> list[tuple[str, str]]:
    """(title, knob) of the columns that say anything: eps and norm eps are left out where no rule has one."""
    return [
        (title, knob)
        for title, knob in COLUMNS
        if knob in ("init_std", "multiplier", "lr") or any(getattr(rule, knob) is not None for rule in table.rules)
    ]


def cell(value: Expr | None) -> str:
    """``n^-1/2``, ``1`` for n^0, ``·`` where the role has no such knob."""
    return "·" if value is None else "1" if value == 0 else f"{n_to(value)}"


def knob_cell(rule: Rule, knob: str) -> str:
    """A cell, with the power of ln N where the largest of N channels has a say."""
    text = cell(getattr(rule, knob))
    if rule.lr_log is None or knob not in ("lr", "weight_decay"):
        return text
    return f"{text} · (ln {rule.channels})^{show(rule.lr_log if knob == 'lr' else -rule.lr_log)}".removeprefix("1 · ")


def title(table: RuleTable) -> str:
    return (
        f"{table.architecture} · {table.optimizer} · {table.scaling} · {table.assumptions[0].split(':')[0]}, "
        f"{table.regime} · {table.gauge} gauge"
    )


def terminal(table: RuleTable, *, assumptions: bool = False) -> list[RenderableType]:
    """What the command line prints: the rules, then the findings, then what was assumed."""
    from rich.table import Table
    from rich.text import Text

    grid = Table(
        title=Text(title(table)),
        title_justify="left",
        title_style="bold",
        caption_justify="left",
        caption=f"multiply each base value by {_powers(table)}",
        header_style="bold",
    )
    for name in ("role", "shape"):
        grid.add_column(name, no_wrap=True)
    shown = columns(table)
    for name, _ in shown:
        grid.add_column(name, justify="right", no_wrap=True)
    for rule in table.rules:
        grid.add_row(Text(rule.role), Text(shape(rule)), *(knob_cell(rule, knob) for _, knob in shown))
    parts: list[RenderableType] = [grid]
    if table.findings:
        parts.append(Text(f"\n{len(table.findings)} finding{'s' * (len(table.findings) > 1)}", style="bold"))
        for cure, group in groupby(table.findings, key=lambda finding: finding.cure):
            parts += [
                Text.assemble((each.kind, "yellow"), " ", (each.where, "bold"), f": {each.message}") for each in group
            ]
            parts.append(Text(f"    → {cure}"))
    if assumptions:
        parts.append(Text("\nassumed", style="bold"))
        parts += [Text(f"- {line}") for line in table.assumptions]
    parts.append(Text(f"\n{table.hash}", style="dim"))
    return parts


def _powers(table: RuleTable) -> str:
    more = " and of ln N / ln N_base" if any(rule.lr_log is not None for rule in table.rules) else ""
    return f"this power of n / n_base{more}"


def shape(rule: Rule) -> str:
    return f"[{', '.join(rule.shape)}]" if rule.shape else "·"


def markdown(table: RuleTable) -> str:
    """A Markdown table with the findings and assumptions below it."""
    shown = columns(table)
    lines = [
        f"### {title(table)}",
        "",
        "| role | shape | " + " | ".join(name for name, _ in shown) + " |",
        "|---|---|" + "---:|" * len(shown),
    ]
    lines += [
        f"| `{rule.role}` | `{shape(rule)}` | " + " | ".join(knob_cell(rule, knob) for _, knob in shown) + " |"
        for rule in table.rules
    ]
    if table.findings:
        lines += ["", "**Findings**", ""]
        lines += [
            f"- **{each.kind}** `{each.where}` ({n_to(each.exponent)}): {each.message}. Cure: {each.cure}."
            for each in table.findings
        ]
    lines += ["", "**Assumed**", "", *(f"- {line}" for line in table.assumptions), "", f"`{table.hash}`", ""]
    return "\n".join(lines)


def latex_table(table: RuleTable) -> str:
    """A LaTeX ``tabular`` of the rules, for a paper's appendix."""

    def math(rule: Rule, knob: str) -> str:
        value: Expr | None = getattr(rule, knob)
        if value is None:
            return "--"
        power = "1" if value == 0 else f"n^{{{latex(value, fold_short_frac=True)}}}"
        if rule.lr_log is None or knob not in ("lr", "weight_decay"):
            return f"${power}$"
        log = latex(rule.lr_log if knob == "lr" else -rule.lr_log, fold_short_frac=True)
        return rf"${'' if value == 0 else power}(\ln \texttt{{{text(rule.channels)}}})^{{{log}}}$"

    def text(raw: str) -> str:
        return raw.replace("_", r"\_")

    shown = columns(table)
    rows = [
        " & ".join([rf"\texttt{{{text(rule.role)}}}", *(math(rule, knob) for _, knob in shown)]) + r" \\"
        for rule in table.rules
    ]
    head = " & ".join(["role", *(name for name, _ in shown)]) + r" \\"
    return "\n".join(
        [
            f"% {title(table)}",
            f"% {table.hash}",
            rf"\begin{{tabular}}{{l{'r' * len(shown)}}}",
            r"\hline",
            head,
            r"\hline",
            *rows,
            r"\hline",
            r"\end{tabular}",
            "",
        ]
    )
