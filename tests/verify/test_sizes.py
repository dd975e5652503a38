"""The engine's exponents against a run of the very graph it derived them from."""

import pytest

torch = pytest.importorskip("torch")

from widthwise.derive import DeriveError, architecture, derive  # noqa: E402
from widthwise.verify.execute import Setting  # noqa: E402
from widthwise.verify.sizes import measure  # noqa: E402

AXES = {"d_model": 64, "vocab": 16, "taps": 4, "ffn": 64, "G": 2}
BASE = {"a_proj": 0.1}  # gates near their bias at the base width, as in practice
HEADS = {"heads-fixed": {"H": 4, "d_k": 16, "d_v": 16}, "head-dim-fixed": {"H": 4, "d_k": 16, "d_v": 16}}


def settings(scaling: str, **changed: int) -> list[Setting]:
    return [Setting(width, 64, AXES | HEADS[scaling] | changed, multipliers=BASE) for width in (64, 128, 256)]


@pytest.mark.parametrize("scaling", sorted(HEADS))
def test_derived_sizes_are_measured(scaling: str) -> None:
    """Forward within 0.1; gradients within 0.3 or three standard errors at these three small widths and few heads
    (bench/sizes.py has more of both). A wrong exponent is off by 0.5."""
    graph = architecture("gated_deltanet", scaling=scaling, activation=False)
    table = derive(graph, "sgd")
    found = measure(graph, table, settings(scaling), seeds=8, length=8)
    assert len(found.forward) > 25
    for each in found.forward:
        assert each.off < 0.1 + 2 * each.error, each
    for each in found.gradient:
        assert each.off < max(0.3, 3 * each.error), each


def test_a_wrong_exponent_would_be_seen() -> None:
    """The same measurement against the other scaling's prediction fails."""
    graph = architecture("gated_deltanet", activation=False)
    wrong = derive(architecture("gated_deltanet", scaling="head-dim-fixed", activation=False), "sgd")
    right = derive(graph, "sgd")
    found = measure(graph, right, settings("heads-fixed"), seeds=2, length=8)
    sizes = {each.name: float(each.forward) for each in wrong.tensors}
    assert abs(next(each.measured for each in found.forward if each.name == "o") - sizes["o"]) > 0.3


def test_widths_that_do_not_divide_are_refused() -> None:
    graph = architecture("gated_deltanet")
    table = derive(graph, "sgd")
    with pytest.raises(DeriveError, match="entries"):
        measure(graph, table, [Setting(65, 64, AXES | HEADS["heads-fixed"])], seeds=1)
    with pytest.raises(DeriveError, match="has no size"):
        measure(graph, table, [Setting(64, 64, {})], seeds=1)
