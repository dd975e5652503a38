"""The measured facts about Gated DeltaNet (64 ≤ n ≤ 4096) that the engine has to predict."""

import pytest

from widthwise.derive import RuleTable, architecture, derive
from widthwise.derive.exponents import parse, show


def gdn(optimizer: str = "sgd", *, request: dict | None = None, **options: object) -> RuleTable:
    return derive(architecture("gated_deltanet", **options), optimizer, **(request or {}))


@pytest.mark.parametrize("regime", ["practical", "asymptotic"])
def test_scan_output_without_silu_falls_as_the_square_root(regime: str) -> None:
    """Measured slope −0.45; q·k is incoherent, because q_proj's rows flip."""
    assert gdn(activation=False, request={"regime": regime}).tensor("o").as_dict()["forward"] == "-1/2"


def test_scan_output_with_silu_has_two_regimes() -> None:
    """SiLU leaves q·k a mean of about 0.05, which takes over near d_k ≈ 350 (measured)."""
    assert gdn().tensor("o").as_dict()["forward"] == "-1/2"
    assert gdn(request={"regime": "asymptotic"}).tensor("o").as_dict()["forward"] == "0"
    (finding,) = [each for each in gdn().findings if each.kind == "nonlinear-coherence"]
    fraction = float(finding.message.split("mean fraction of ")[1].split(",")[0])
    crossover = float(finding.message.split("≈ ")[1].split()[0])
    assert fraction == pytest.approx(0.05, rel=0.3)
    assert 200 < crossover < 500


@pytest.mark.parametrize(
    ("scaling", "measured"), [("heads-fixed", "-1/2"), ("head-dim-fixed", "-1"), ("mixed", "h/2 - 1")]
)
def test_gradient_of_the_gate(scaling: str, measured: str) -> None:
    gradient = gdn(scaling=scaling).tensor("z_alpha").as_dict()["gradient"]
    assert gradient == measured if scaling != "mixed" else True
    if scaling == "mixed":  # n^-1 at h = 0 and n^-1/2 at h = 1
        assert show(parse(gradient).subs("h", 0)) == "-1"
        assert show(parse(gradient).subs("h", 1)) == "-1/2"


def test_gates_under_sgd_early_and_aligned() -> None:
    """−1/2 describes 64 ≤ n ≤ 4096; −1 is the fully aligned rule, for n beyond about 10⁴."""
    assert gdn().rule("a_proj").as_dict()["lr"] == "-1/2"
    assert gdn(request={"regime": "asymptotic"}).rule("a_proj").as_dict()["lr"] == "-1"
    assert gdn(request={"assume": "aligned"}).rule("a_proj").as_dict()["lr"] == "-1"
    crossing = {each.where: each for each in gdn().findings if each.kind == "crossover"}
    assert show(crossing["a_proj"].exponent) == "-1/2"


@pytest.mark.parametrize("role", ["a_proj", "b_proj"])
def test_operator_norm_of_the_gates(role: str) -> None:
    """With init 1/√n, W·Δh grows as n^(1/2) with heads fixed, and not at all with growing numbers of heads."""
    kept = {f"{role}.init_std": "-1/2"}

    def growth(**options: object) -> list[str]:
        return [
            show(each.exponent)
            for each in gdn(request={"fix": kept}, **options).findings
            if each.kind == "operator-norm" and each.where == role
        ]

    assert growth() == ["1/2"]
    assert growth(scaling="head-dim-fixed") == []
    assert [each for each in gdn().findings if each.kind == "operator-norm"] == []  # the derived init obeys the bound
    assert gdn().rule(role).as_dict()["init_std"] == "-1"


@pytest.mark.parametrize(("qk_scale", "sinks"), [("1", "-1/2"), ("d_k^-1/2", "-1")])
def test_output_norm_sinks_toward_its_eps(qk_scale: str, sinks: str) -> None:
    bare = gdn(qk_scale=qk_scale, o_scale=False)
    (finding,) = [each for each in bare.findings if each.kind == "norm-eps"]
    assert (finding.where, show(finding.exponent)) == ("o", sinks)
    assert "applied" not in finding.cure
    cured = gdn(qk_scale=qk_scale)
    assert cured.rule("o_scale").as_dict()["multiplier"] == show(-parse(sinks))
    assert "applied here" in next(each for each in cured.findings if each.kind == "norm-eps").cure


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("request_", [{}, {"regime": "asymptotic"}, {"assume": "aligned"}])
def test_mixed_scaling_contains_both(optimizer: str, request_: dict) -> None:
    mixed = gdn(optimizer, request=request_, scaling="mixed")
    for h, scaling in ((1, "heads-fixed"), (0, "head-dim-fixed")):
        pure = gdn(optimizer, request=request_, scaling=scaling)
        for rule in mixed.rules:
            for knob in ("init_std", "multiplier", "lr", "weight_decay", "eps"):
                value, other = getattr(rule, knob), getattr(pure.rule(rule.role), knob)
                assert (value is None) == (other is None)
                assert value is None or value.subs("h", h) == other, (rule.role, knob)


def test_heads_share_the_gain_of_the_output_norm() -> None:
    """A gain shared by all heads sums its gradient over a width axis once the number of heads grows."""
    lr = {scaling: gdn(scaling=scaling).rule("o_norm").as_dict()["lr"] for scaling in ("heads-fixed", "head-dim-fixed")}
    assert lr == {"heads-fixed": "1", "head-dim-fixed": "1/2"}
    assert gdn(scaling="head-dim-fixed", request={"regime": "asymptotic"}).rule("o_norm").as_dict()["lr"] == "0"


def test_depth_moves_nothing() -> None:
    assert gdn(depth=2).content() == gdn(depth=96).content()


def test_liu_gu_code_disagrees_on_gains_and_convolutions() -> None:
    """The authors' code gives norm gains and depthwise taps the hidden learning rate; they are vector-like."""
    table = gdn("adamw", tied=True, request={"preset": "liu-gu-2026"})
    assert {table.rule(role).as_dict()["lr"] for role in ("attn_norm", "o_norm", "norm", "q_conv1d")} == {"0"}
