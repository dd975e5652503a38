"""Exponents of the width: exact rationals, or affine forms in symbolic exponents such as ``h``.

Every symbolic exponent lives in [0, 1] (a dimension grows no faster than the width and does not shrink), which
is what makes "the larger of two sizes" decidable: an affine form is compared at the corners of that box, a
piecewise affine one in a single symbol at its kinks too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from itertools import combinations

from sympy import Expr, Float, Integer, Max, Min, Rational, Symbol

from widthwise.derive.errors import DeriveError

ZERO: Expr = Integer(0)
ONE: Expr = Integer(1)
HALF: Expr = Rational(1, 2)


def exponent(value: int | str | Expr) -> Expr:
    """An exponent from a number, a text such as ``"h/2 - 1"``, or a SymPy expression (floats are refused)."""
    if isinstance(value, Expr) and not value.has(Float):
        return value
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise DeriveError(f"the exponent {value!r} is not exact", cure='write a fraction, for example "1/2"')
    return Integer(value) if isinstance(value, int) else parse(value)


def at_most(a: Expr, b: Expr) -> bool:
    """Whether a ≤ b for every value of the symbolic exponents in [0, 1]."""
    difference = a - b
    if difference.is_Rational:
        return bool(difference <= 0)
    if not difference.atoms(Max, Min):  # affine: the box's worst corner, found symbol by symbol
        terms = difference.as_coefficients_dict()
        return bool(sum((rate if form == 1 else max(rate, ZERO) for form, rate in terms.items()), ZERO) <= 0)
    return all(difference.xreplace(point) <= 0 for point in _kinks(difference))


@lru_cache(maxsize=4096)
def _kinks(form: Expr) -> tuple[dict[Symbol, Expr], ...]:
    """Both ends and every kink of a piecewise affine form: its sign is decided there."""
    symbols = sorted(form.free_symbols, key=str)
    if len(symbols) > 1:
        raise DeriveError(
            f"cannot decide the sign of {show(form)[:80]} in several symbolic exponents",
            cure="give all but one of them a number",
        )
    (symbol,) = symbols
    points = {ZERO, ONE}
    for piece in form.atoms(Max, Min):  # a kink lies where two arguments of a Max or Min cross
        for left, right in combinations(piece.args, 2):
            gap = left - right
            rate = gap.coeff(symbol)
            if rate != 0 and 0 <= (root := -gap.xreplace({symbol: ZERO}) / rate) <= 1:
                points.add(root)
    return tuple({symbol: point} for point in points)


def largest(sizes: Iterable[Expr]) -> Expr:
    """The largest of some sizes; a ``Max`` only where no one of them dominates the others."""
    kept: list[Expr] = []
    for size in dict.fromkeys(sizes):
        if any(at_most(size, other) for other in kept):
            continue
        kept = [other for other in kept if not at_most(other, size)] + [size]
    if not kept:
        raise ValueError("the largest of no sizes")
    return kept[0] if len(kept) == 1 else Max(*kept)


def smallest(sizes: Iterable[Expr]) -> Expr:
    """The smallest of some sizes."""
    top = largest(-size for size in sizes)
    return Min(*(-size for size in top.args)) if isinstance(top, Max) else -top


def show(value: Expr) -> str:
    """Canonical text, readable by :func:`parse`.

    >>> show(parse("h/2-1")), show(parse("-1/2")), show(parse("min(0, h - 1/2)"))
    ('h/2 - 1', '-1/2', 'min(0, h - 1/2)')
    """
    return str(value).replace("Max(", "max(").replace("Min(", "min(")


def n_to(value: Expr) -> str:
    """A power of the width as text: ``n^-1/2``, ``n^(h/2 - 1)``."""
    text = show(value)
    return f"n^({text})" if " " in text else f"n^{text}"


_TOKEN = re.compile(r" *(?:(\d{1,6})|([a-z][a-z0-9_]{0,15})|([-+*/(),]))")


def parse(text: str) -> Expr:
    """Read an exponent: sums of rationals times symbols, ``min(…)``, ``max(…)``. Nothing is evaluated.

    Raises:
        DeriveError: on any text outside this grammar.
    """
    refused = DeriveError(f"{text[:40]!r} is not an exponent", cure='write for example "-1/2", "0" or "h/2 - 1"')
    if not isinstance(text, str) or len(text) > 200:
        raise refused
    tokens: list[str] = []
    position, end = 0, len(text.rstrip(" "))
    while position < end:
        match = _TOKEN.match(text, position)
        if match is None:
            raise refused
        tokens.append(match.group().strip())
        position = match.end()
    tokens.append("")

    def take(expected: str = "") -> str:
        if expected and tokens[0] != expected:
            raise refused
        return tokens.pop(0)

    def total() -> Expr:
        value = factor()
        while tokens[0] in ("+", "-"):
            sign = 1 if take() == "+" else -1
            value += sign * factor()
        return value

    def factor() -> Expr:
        value = atom()
        while tokens[0] in ("*", "/"):
            operator, right = take(), atom()
            if operator == "*" and (value.is_Rational or right.is_Rational):
                value = value * right
            elif operator == "/" and right.is_Rational and right != 0:
                value = value / right
            else:
                raise refused
        return value

    def atom() -> Expr:
        token = take()
        if token == "-":
            return -atom()
        if token.isdigit():
            return Integer(int(token))
        if token == "(":
            value = total()
            take(")")
            return value
        if token in ("min", "max"):
            take("(")
            values = [total()]
            while tokens[0] == ",":
                take()
                values.append(total())
            take(")")
            return smallest(values) if token == "min" else largest(values)
        if token and token[0].isalpha():
            return Symbol(token)
        raise refused

    value = total()
    if tokens != [""]:
        raise refused
    return value
