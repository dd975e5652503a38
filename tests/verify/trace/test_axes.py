"""Axes: told apart by structure, refined in place, cut and joined exactly."""

import pytest

from widthwise.derive.errors import DeriveError
from widthwise.verify.trace.axes import concatenated, cut, identify, new, pieces, regroup, resolved

ONES, B, H, D = (1, 1), (2, 2), (4, 8), (16, 16)


def times(*sizes):
    return tuple(a * b for a, b in zip(*sizes, strict=True))


def sizes(dimension):
    return [axis.sizes for axis in resolved(dimension)]


def test_a_view_splits_an_axis_for_everybody() -> None:
    rows = new(times(H, D), weight=True)
    other = list(rows)
    heads, inner = regroup([rows], [H, D])
    assert (sizes(heads), sizes(inner)) == ([H], [D])
    assert sizes(other) == [H, D]
    (joined,) = regroup([heads, inner], [times(H, D)])
    assert resolved(joined) == resolved(rows)


def test_a_view_across_axes_is_refused() -> None:
    with pytest.raises(DeriveError, match="cuts across axes"):
        regroup([new((4, 4)), new((3, 3))], [(6, 6), (2, 2)])


def test_equal_sizes_are_not_the_same_axis() -> None:
    a, b, c = new(H), new(H), new(H)
    identify(a, b)
    assert resolved(a) == resolved(b) != resolved(c)


def test_reading_together_splits_the_coarser_one() -> None:
    whole, parts = new(times(H, D)), [*new(H), *new(D)]
    identify(whole, parts)
    assert resolved(whole) == resolved(parts)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DeriveError, match="are read together"):
        identify(new((4, 6)), new((6, 4)))


def test_cuts_are_refined_where_tensors_meet() -> None:
    one, two = new((10, 14), weight=True), new((10, 14))
    cut(one, [(2, 2), (8, 12)])
    cut(two, [(6, 8), (4, 6)])
    identify(one, two)
    found = [piece.extent for piece in pieces(one)]
    assert found == [(2, 2), (4, 6), (4, 6)]
    assert [piece.extent for piece in pieces(two)] == found


def test_a_cut_across_widths_is_refused() -> None:
    one, two = new((10, 14)), new((10, 14))
    cut(one, [(2, 9), (8, 5)])
    cut(two, [(6, 8), (4, 6)])
    with pytest.raises(DeriveError, match="another order at another width"):
        identify(one, two)


def test_interleaved_parts_count_rows_in_each_period() -> None:
    rows = new(times(H, (48, 48)), weight=True)
    _, inner = regroup([rows], [H, (48, 48)])
    cut(inner, [(16, 16), (32, 32)])
    first, second = pieces(rows)
    assert (first.extent, second.extent) == ((16, 16), (32, 32))
    assert [axis.sizes for axis in first.axes] == [H, (16, 16)]


def test_a_concatenation_of_features_is_one_and_of_tokens_is_none() -> None:
    q, k = new(H, weight=True), new(D, weight=True)
    both = concatenated([q, k], tuple(a + b for a, b in zip(H, D, strict=True)))
    assert [piece.axes[0] for piece in pieces(both)] == [*resolved(q), *resolved(k)]
    assert pieces(concatenated([new(B), new(D)], (18, 18)))[0].key is None


def test_what_a_weight_has_is_a_feature_in_all_its_parts() -> None:
    tokens = new(times(H, D))
    heads, inner = regroup([tokens], [H, D])
    assert not heads[0].feature
    identify(tokens, new(times(H, D), weight=True))
    assert resolved(heads)[0].feature
    assert resolved(inner)[0].feature


def test_cutting_one_is_refused() -> None:
    with pytest.raises(DeriveError, match="size one"):
        cut(new(ONES), [ONES, ONES])
