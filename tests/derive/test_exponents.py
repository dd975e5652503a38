"""Exact exponents: parsing without evaluation, comparison on the box, canonical text."""

from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sympy import Max, Rational, Symbol

from widthwise.derive import DeriveError
from widthwise.derive.exponents import at_most, largest, n_to, parse, show, smallest

h = Symbol("h")
rationals = st.fractions(-3, 3, max_denominator=8).map(lambda each: Rational(each.numerator, each.denominator))
affine = st.builds(lambda a, b: a * h + b, rationals, rationals)


@given(affine)
def test_text_round_trips(value) -> None:
    assert parse(show(value)) == value


@given(affine, affine)
def test_largest_is_pointwise(a, b) -> None:
    top = largest([a, b])
    for point in (Rational(0), Rational(1, 3), Rational(1)):
        assert top.subs(h, point) == max(a.subs(h, point), b.subs(h, point))
    assert at_most(a, top)
    assert at_most(smallest([a, b]), a)


@settings(max_examples=30, deadline=None)
@given(affine, affine, affine)
def test_at_most_decides_over_the_whole_box(a, b, c) -> None:
    top = largest([a, b])
    holds = all(c.subs(h, Rational(step, 60)) <= top.subs(h, Rational(step, 60)) for step in range(61))
    if at_most(c, top):
        assert holds
    elif holds:  # a violation between grid points: at the kink itself
        kink = -(a - b).subs(h, 0) / (a - b).coeff(h)
        assert c.subs(h, kink) > top.subs(h, kink)


def test_piecewise_exponents_have_a_text() -> None:
    value = largest([h / 2, Rational(1, 4)])
    assert isinstance(value, Max)
    assert parse(show(value)) == value
    assert (n_to(h - 1), n_to(Rational(-1, 2))) == ("n^(h - 1)", "n^-1/2")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1/0",
        "h**2",
        "__import__('os').system('true')",
        "1e3",
        "0.5",
        "h h",
        "(1",
        "1)",
        "lambda: 0",
        "n\n",
        "max()",
        "h*h",
        "[1]",
        "9" * 50,
        "h" * 40,
        "1;2",
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(DeriveError):
        parse(text)


@given(st.text(max_size=60))
def test_garbage_never_raises_anything_else(text: str) -> None:
    with suppress(DeriveError):
        parse(text)


def test_a_kink_between_the_ends_decides() -> None:
    """max(h, 1 - h) is 1 at both ends and 1/2 in the middle."""
    valley = largest([h, 1 - h])
    assert at_most(Rational(1, 2), valley)
    assert not at_most(Rational(3, 4), valley)
    assert show(smallest([h, 1 - h])).startswith("min(")
