"""The exact solve: every knob is the largest that no constraint on it forbids.

Unknown knobs travel through the forward walk as symbols, because homogeneous ops only add to exponents. Where a
tensor meets something that has a scale of its own (a nonlinearity, a norm, another weight, the loss) its size is
bounded, and the one unknown in each bound is eliminated there and then. Constraints are therefore triangular:
exact, linear in the size of the graph, and each knob remembers the constraint that bound it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from sympy import Expr, Max, Symbol

from widthwise.derive.errors import DeriveError
from widthwise.derive.exponents import ZERO, at_most, largest
from widthwise.derive.facts import Fact
from widthwise.derive.signal import Signal, Term

INIT, MULTIPLIER, STEP = "init_std", "multiplier", "step"


@dataclass(frozen=True)
class Constraint:
    """``form`` ≤ ``bound``; ``fact`` says where the form comes from and ``reason`` why it is bounded."""

    form: Expr
    bound: Expr
    reason: str
    fact: Fact


@dataclass(frozen=True)
class Violation:
    """A constraint with no unknown left in it that does not hold: a pinned knob is too large."""

    constraint: Constraint
    excess: Expr


@dataclass
class Knobs:
    """The unknowns of one derivation: the fixed ones, the solved ones, and what bound each."""

    fixed: Mapping[tuple[str, str], Expr] = field(default_factory=dict)
    caps: Mapping[Symbol, tuple[Expr, Constraint]] = field(default_factory=dict)
    values: dict[Symbol, Expr] = field(default_factory=dict)
    bindings: dict[Symbol, Fact] = field(default_factory=dict)
    tight: dict[Symbol, Constraint] = field(default_factory=dict)
    violations: list[Violation] = field(default_factory=list)
    constraints: list[Constraint] = field(default_factory=list)
    _open: dict[Symbol, tuple[str, str, str]] = field(default_factory=dict)

    def symbol(self, kind: str, name: str) -> Symbol:
        return Symbol(f"{kind}[{name}]")

    def unknown(self, kind: str, name: str, where: str = "") -> Expr:
        """The knob as a symbol to be solved for, or its value where the user fixed it."""
        symbol = self.symbol(kind, name)
        if symbol not in self.values and (kind, name) in self.fixed:
            self.fix(kind, name, self.fixed[kind, name], "fixed by the request")
        if symbol in self.values:
            return self.values[symbol]
        self._open[symbol] = (kind, name, where)
        return symbol

    def fix(self, kind: str, name: str, value: Expr, because: str) -> None:
        symbol = self.symbol(kind, name)
        self.values[symbol] = value
        self.bindings[symbol] = Fact(_title(kind, name), value, because)

    def value(self, form: Expr) -> Expr:
        """A form with every solved knob replaced by its value."""
        return form.xreplace(self.values) if form.free_symbols else form

    def resolved(self, signal: Signal) -> Signal:
        return signal.mapped(lambda term: Term(self.value(term.size), term.odd))

    def size(self, signal: Signal) -> Expr:
        """A signal's size, also while it holds unknowns (then as a plain Max, to be resolved later)."""
        sizes = {self.value(term.size) for term in signal.terms}
        return Max(*sizes) if any(size.free_symbols & self._open.keys() for size in sizes) else largest(sizes)

    def settled(self, form: Expr) -> Expr:
        """A form at the solution, as plain as it can be written."""
        value = self.value(form)
        return largest(value.args) if isinstance(value, Max) else value

    def impose(self, constraints: Iterable[Constraint]) -> None:
        """Bound the unknowns of these constraints from above, each by the tightest; check those with none."""
        tightest: dict[Symbol, tuple[Expr, Constraint]] = {}
        checks: list[Constraint] = []
        for constraint in constraints:
            self.constraints.append(constraint)
            form = self.value(constraint.form)
            unknown = form.free_symbols & self._open.keys()
            if not unknown:
                checks.append(constraint)
                continue
            if len(unknown) > 1:
                names = ", ".join(sorted(map(str, unknown)))
                raise DeriveError(
                    f"one constraint bounds only the product of {names}",
                    where=constraint.fact.subject,
                    cure="fix all but one of them",
                )
            (symbol,) = unknown
            bound = self.value(constraint.bound) - (form - symbol)
            if symbol not in tightest or not at_most(tightest[symbol][0], bound):
                tightest[symbol] = (bound, constraint)
        for symbol, (bound, constraint) in tightest.items():
            if symbol in self.caps and not at_most(bound, self.caps[symbol][0]):
                bound, constraint = self.caps[symbol]
            self.values[symbol], self.tight[symbol] = bound, constraint
            kind, name, _ = self._open.pop(symbol)
            self.bindings[symbol] = Fact(_title(kind, name), bound, constraint.reason, (constraint.fact,))
        for constraint in checks:
            excess = self.value(constraint.form) - self.value(constraint.bound)
            if not at_most(excess, ZERO):
                self.violations.append(Violation(constraint, excess))

    def finish(self) -> None:
        """Refuse knobs that nothing bounded."""
        for kind, name, where in self._open.values():
            role = name.split("@")[0]
            raise DeriveError(
                f"nothing bounds the {'step' if kind == STEP else kind} of {role!r}",
                where=where,
                cure="what it makes must reach the loss through an op with a scale of its own, "
                "or the knob must be fixed",
            )

    def exceeded_later(self) -> dict[Symbol, tuple[Expr, Constraint]]:
        """Knobs solved at one use of a weight that break a bound at a later one: how low each has to be."""
        lower: dict[Symbol, tuple[Expr, Constraint]] = {}
        for violation in self.violations:
            form = violation.constraint.form
            for symbol in form.free_symbols & self.tight.keys():
                bound = self.values[symbol] - violation.excess / form.coeff(symbol)
                if symbol not in lower or not at_most(lower[symbol][0], bound):
                    lower[symbol] = (bound, violation.constraint)
        return lower

    def holds(self) -> bool:
        """Whether every constraint met so far holds at the solution."""
        return all(at_most(self.value(each.form), self.value(each.bound)) for each in self.constraints)


def _title(kind: str, name: str) -> str:
    role, _, output = name.partition("@")
    return f"tolerated step of {role} in {output}" if kind == STEP else f"{kind} of {name}"
