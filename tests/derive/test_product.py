"""Products of factors as trees."""

from math import inf

import pytest

from widthwise.derive.laws import NORMAL
from widthwise.derive.product import MOST, Applied, Factor, Product, degree, factors, product, within_bounds

A, B, C = (Factor(name, name, NORMAL) for name in "abc")


def test_products_of_products_are_one_and_nothing_adds_nothing() -> None:
    assert product(A, product(B, product()), product()) == Product((A, B))
    assert not product()


def test_factors_are_told_once_from_left_to_right() -> None:
    assert factors(product(Applied("silu", product(B, A)), B, C)) == (B, A, C)


@pytest.mark.parametrize(
    ("tree", "grows"),
    [
        (product(A, B, C), 3),
        (product(A, A), 2),
        (product(Applied("silu", product(A, B)), C), 3),
        (product(Applied("sigmoid", product(A)), B, C), 2),
        (product(Applied("tanh", product(A, Applied("exp", product(B))))), 0),
        (product(Applied("exp", product(A)), B), inf),
        (product(Applied("exp", product(Applied("sigmoid", product(A)))), B), 1),
        (product(), 0),
    ],
)
def test_the_degree_is_that_of_large_factors(tree: Product, grows: float) -> None:
    assert degree(tree) == grows


def test_too_long_a_product_keeps_each_factor() -> None:
    long = product(*[A, B] * MOST)
    assert within_bounds(long) == product(A, B)
    assert within_bounds(product(Applied("silu", long), C)) == product(A, B, C)
    assert within_bounds(product(A, A)) == product(A, A)
