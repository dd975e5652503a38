"""Norms behind a scan: those that divide by what may be near zero, and those whose input steps outgrow."""

import pytest

from widthwise.derive import Builder, RuleTable, architecture, derive
from widthwise.derive.builder import Tensor
from widthwise.derive.exponents import show
from widthwise.derive.graph import Graph


def found(table: RuleTable, kind: str) -> dict[str, str]:
    return {each.where: show(each.exponent) for each in table.findings if each.kind == kind}


def normed(
    *,
    norm: str = "rms_norm",
    features: str | None = None,
    same: bool = False,
    together: bool = False,
    gated: bool = False,
    gates: str = "",
    own_keys: bool = True,
    practical: int = 256,
) -> Graph:
    """Growing heads of a fixed size: a scan, and a norm of what it puts out."""
    g = Builder("normed")
    heads, d_v, n = g.dim("H", 1), g.dim("d_v"), g.dim("n", 1)
    d_k = g.dim("d_k", practical=practical)
    x = g.linear(g.input("x", g.dim("features")), "first", n)

    def made(name: str, *axes: object) -> Tensor:
        z = g.linear(x, name, heads * axes[-1] if len(axes) > 1 else axes[-1])  # type: ignore[arg-type, operator]
        z = g.reshape(z, *axes) if len(axes) > 1 else z  # type: ignore[arg-type]
        return z

    def key(name: str) -> Tensor:
        z = made(name, heads, d_k) if own_keys else made(name, d_k)
        return g.pointwise(features, z) if features else z

    q, v = key("q"), made("v", heads, d_v)
    k = q if same else key("k")
    k, q = g.norm(k, kind="l2_norm"), g.norm(q, kind="l2_norm")
    also = {each: g.pointwise("sigmoid", g.linear(x, each, heads)) for each in ("decay", "strength") if each in gates}
    o = g.scale(g.scan(q, k, v, output="o", **also), factor=2.0)
    if gated:
        o = g.product(o, g.pointwise("silu", made("gate", heads, d_v)))
    if together:
        y = g.norm(g.reshape(o, heads * d_v), "gain", kind=norm)
    else:
        y = g.reshape(g.norm(o, "gain" if norm != "l2_norm" else None, kind=norm), heads * d_v)
    g.cross_entropy(g.readout(g.linear(y, "last", n), "head", g.dim("classes")))
    return g.build()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
@pytest.mark.parametrize(
    ("scaling", "regime", "expected"),
    [
        ("heads-fixed", "practical", {"o": "0"}),
        ("heads-fixed", "asymptotic", {}),  # SiLU's mean: q·k concentrates as d_k grows
        ("head-dim-fixed", "practical", {"o": "1"}),
        ("head-dim-fixed", "asymptotic", {"o": "1"}),  # d_k stays, and so does the spread of q·k
        ("mixed", "practical", {"o": "1 - h"}),
    ],
)
@pytest.mark.parametrize("qk_scale", ["1", "d_k^-1/2"])
def test_the_smallest_of_the_heads_that_a_wider_model_has_more_of(
    optimizer: str, scaling: str, regime: str, expected: dict[str, str], qk_scale: str
) -> None:
    graph = architecture("gated_deltanet", scaling=scaling, qk_scale=qk_scale)
    assert found(derive(graph, optimizer, regime=regime), "norm-tail") == expected


@pytest.mark.parametrize("request_", [{"regime": "asymptotic"}, {"assume": "aligned"}])
def test_without_a_nonlinearity_no_mean_ever_keeps_the_product_from_zero(request_: dict[str, str]) -> None:
    graph = architecture("gated_deltanet", activation=False)
    assert found(derive(graph, "sgd", **request_), "norm-tail") == {"o": "0"}  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["transformer", "mlp", "mamba2"])
def test_no_scan_in_front_of_a_norm_or_something_added_to_it(name: str) -> None:
    options = {"qk_norm": True} if name == "transformer" else {}
    assert not found(derive(architecture(name, **options), "sgd"), "norm-tail")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm": "layer_norm"},
        {"norm": "l2_norm"},
        {"gated": True},  # a factor of the entries' own does not keep o from zero
        {"gates": "decay"},
        {"gates": "decay strength"},
        {"features": "tanh"},
        {"features": "silu", "practical": 32},  # its mean takes over at 66 entries, more than this axis ever has
    ],
)
def test_each_head_has_a_product_of_its_own(options: dict[str, str]) -> None:
    assert found(derive(normed(**options), "adamw"), "norm-tail") == {"o": "1"}  # type: ignore[arg-type]


def test_heads_that_share_their_keys_have_one_product_between_them() -> None:
    assert found(derive(normed(own_keys=False), "adamw"), "norm-tail") == {"o": "0"}


@pytest.mark.parametrize(
    "options",
    [
        {"together": True},  # many heads are not near zero together
        {"features": "exp"},  # terms of one sign
        {"features": "relu"},
        {"features": "silu"},
        {"same": True},  # a sum of squares
    ],
)
def test_a_product_with_a_mean_is_not_near_zero(options: dict[str, str]) -> None:
    assert not found(derive(normed(**options), "adamw"), "norm-tail")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("scaling", "request_", "expected"),
    [
        ("heads-fixed", {}, {"o": "1/2"}),
        ("heads-fixed", {"assume": "largest-channel"}, {"o": "1/2"}),
        ("heads-fixed", {"regime": "asymptotic"}, {}),  # q·k is as coherent as its change
        ("heads-fixed", {"assume": "unaligned"}, {}),  # and here its change no more than it
        ("heads-fixed", {"optimizer": "adamw"}, {}),  # steps of a size of their own are over soon
        ("head-dim-fixed", {}, {}),
        ("mixed", {}, {"o": "h/2"}),
    ],
)
def test_steps_move_an_incoherent_product_by_more_than_it_is(
    scaling: str, request_: dict[str, str], expected: dict[str, str]
) -> None:
    table = derive(architecture("gated_deltanet", scaling=scaling), **{"optimizer": "sgd"} | request_)  # type: ignore[arg-type]
    assert found(table, "norm-outgrown") == expected
    for finding in table.findings:
        if finding.kind == "norm-outgrown":
            assert "steps of q_proj, q_conv1d, k_proj, k_conv1d move" in finding.message


@pytest.mark.parametrize("name", ["transformer", "mamba2", "mlp"])
def test_nothing_is_outgrown_where_no_norm_hides_it(name: str) -> None:
    assert not found(derive(architecture(name), "sgd"), "norm-outgrown")
