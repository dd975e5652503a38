"""``--regime throughout``: learning rates that hold before and past the crossovers."""

import pytest

from widthwise.derive import Builder, DeriveError, RuleTable, architecture, derive
from widthwise.derive.exponents import HALF, ZERO, at_most, show

HELD = {"q_proj", "q_conv1d", "k_proj", "k_conv1d"}
GATES = {"a_proj", "b_proj", "A_log", "dt_bias"}


def rates(table: RuleTable) -> dict[str, str]:
    return {rule.role: show(rule.lr) for rule in table.rules if rule.lr is not None}


def both(scaling: str, **request: str) -> tuple[RuleTable, RuleTable, RuleTable]:
    graph = architecture("gated_deltanet", scaling=scaling)
    return tuple(  # type: ignore[return-value]
        derive(graph, "sgd", regime=regime, **request)  # type: ignore[arg-type]
        for regime in ("practical", "asymptotic", "throughout")
    )


def test_of_each_role_the_slower_branch_and_keys_held_back() -> None:
    early, late, whole = both("heads-fixed")
    for rule in early.rules:
        kept, mine = late.rule(rule.role), whole.rule(rule.role)
        assert (mine.init_std, mine.multiplier) == (rule.init_std, rule.multiplier)
        if rule.lr is None:
            continue
        if rule.role in HELD:
            assert mine.lr == rule.lr - HALF != kept.lr
        else:
            assert mine.lr == kept.lr
            assert (mine.lr == rule.lr) == (rule.role not in GATES)


def test_with_head_dims_fixed_the_late_branch_is_the_slower_one() -> None:
    early, late, whole = both("head-dim-fixed")
    assert rates(whole) == rates(late) != rates(early)


def test_symbolic_scalings_have_it_too() -> None:
    _, _, whole = both("mixed")
    assert show(whole.rule("q_proj").lr or ZERO) == "-h/2"
    assert show(whole.rule("a_proj").lr or ZERO) == "-h"
    assert show(whole.rule("o_norm").lr or ZERO) == "h"


@pytest.mark.parametrize("name", ["transformer", "mamba2", "mlp", "gated_linear_attention", "deltanet"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_no_rate_is_larger_than_either_branch_allows(name: str, optimizer: str) -> None:
    graph = architecture(name)
    early, late, whole = (derive(graph, optimizer, regime=each) for each in ("practical", "asymptotic", "throughout"))
    for rule in whole.rules:
        if rule.lr is not None:
            for branch in (early, late):
                allowed = branch.rule(rule.role).lr
                assert allowed is not None
                assert at_most(rule.lr, allowed)
    if optimizer != "sgd":
        assert rates(whole) == rates(early)  # a step of a size of its own


def test_what_it_has_settled_is_no_finding_any_more() -> None:
    early, _, whole = both("heads-fixed")
    told = {(each.kind, each.where) for each in early.findings} - {(each.kind, each.where) for each in whole.findings}
    assert told == {("norm-outgrown", "o"), *(("crossover", role) for role in GATES)}
    early, _, whole = both("head-dim-fixed")
    assert ("early-branch", "o_norm") in {(each.kind, each.where) for each in early.findings}
    assert not {"early-branch", "crossover", "step-size"} & {each.kind for each in whole.findings}


def test_a_rate_fixed_by_hand_stays() -> None:
    table = derive(architecture("gated_deltanet"), "sgd", regime="throughout", fix={"q_proj.lr": "0", "a_proj.lr": "0"})
    assert table.rule("q_proj").lr == table.rule("a_proj").lr == ZERO
    assert table.rule("k_proj").lr == -HALF


def test_weight_decay_follows_and_the_proof_says_why() -> None:
    table = derive(architecture("gated_deltanet"), "sgd", regime="throughout")
    for rule in table.rules:
        assert rule.lr is None or rule.weight_decay == -rule.lr
    assert "move q_normed·k_normed coherently, n^1/2 more than it is" in table.rule("k_conv1d").binding
    assert "past the crossovers: z_alpha tolerates" in table.rule("a_proj").binding
    (last,) = (fact for fact in table.prove["k_conv1d"]() if fact.subject == "lr of k_conv1d" and fact.value == HALF)
    assert last.parents


def test_what_is_held_by_a_power_of_n_needs_no_power_of_its_logarithm() -> None:
    _, late, whole = both("heads-fixed", assume="largest-channel")
    assert {rule.role for rule in late.rules if rule.lr_log} - {
        rule.role for rule in whole.rules if rule.lr_log
    } == HELD


def test_what_the_late_branch_slows_keeps_its_logarithm() -> None:
    graph = architecture("transformer", qk_norm=True)
    early, whole = (derive(graph, "sgd", "largest-channel", regime=each) for each in ("practical", "throughout"))
    mine, begun = whole.rule("q_proj"), early.rule("q_proj")
    assert mine.lr != begun.lr
    assert mine.lr_log == begun.lr_log == -1


def test_sets_without_two_branches_have_no_such_rates() -> None:
    with pytest.raises(DeriveError, match="contradicts the throughout regime"):
        derive(architecture("mlp"), "sgd", "aligned", regime="throughout")


def kinds(table: RuleTable) -> set[tuple[str, str]]:
    return {(each.kind, each.where) for each in table.findings}


@pytest.mark.parametrize("regime", ["practical", "throughout"])
def test_rates_fixed_too_large_are_told(regime: str) -> None:
    table = derive(architecture("gated_deltanet"), "sgd", regime=regime, fix={"q_proj.lr": "0"})
    (finding,) = (each for each in table.findings if each.kind == "norm-outgrown")
    assert ("steps of q_proj move" in finding.message) == (regime == "throughout")  # the others are held
    graph = architecture("gated_deltanet", scaling="head-dim-fixed")
    assert ("early-branch", "o_norm") in kinds(derive(graph, "sgd", regime=regime, fix={"o_norm.lr": "1/2"}))


def test_rates_fixed_as_small_as_they_have_to_be_are_not() -> None:
    fix = {"q_proj.lr": "-1/2", "k_proj.lr": "-1/2", "q_conv1d.lr": "1/2", "k_conv1d.lr": "1/2"}
    assert ("norm-outgrown", "o") not in kinds(derive(architecture("gated_deltanet"), "sgd", fix=fix))
    graph = architecture("gated_deltanet", scaling="head-dim-fixed")
    assert ("early-branch", "o_norm") not in kinds(derive(graph, "sgd", fix={"o_norm.lr": "0"}))


@pytest.mark.parametrize("name", ["gated_deltanet", "gated_linear_attention"])
def test_past_the_crossovers_training_has_made_the_product_coherent(name: str) -> None:
    graph = architecture(name, **({"activation": False} if name == "gated_deltanet" else {}))
    assert ("norm-outgrown", "o") in kinds(derive(graph, "sgd"))
    late, whole = (derive(graph, "sgd", regime=each) for each in ("asymptotic", "throughout"))
    assert ("norm-outgrown", "o") not in kinds(late) | kinds(whole)
    assert rates(late)["q_proj"] == rates(whole)["q_proj"] == "-1/2"


def two_scans(*, second: bool) -> RuleTable:
    """Keys that are a sum of two maps, and, where there is a second scan, a norm behind it as well."""
    g = Builder("two scans")
    n, d_k, d_v = g.dim("n", 1), g.dim("d_k", 1), g.dim("d_v", 1)
    x = g.linear(g.input("x", g.dim("features")), "first", n)
    q = g.norm(g.linear(x, "q", d_k), kind="l2_norm")
    k = g.norm(g.add(g.linear(x, "k_one", d_k), g.linear(x, "k_two", d_k)), kind="l2_norm")
    y = g.norm(g.scan(q, k, g.linear(x, "v", d_v), output="o"), "gain")
    if second:
        y = g.add(y, g.norm(g.scan(q, q, g.linear(x, "w", d_v), output="p"), "other"))
    g.cross_entropy(g.readout(g.linear(y, "last", n), "head", g.dim("classes")))
    return derive(g.build(), "sgd", regime="throughout")


@pytest.mark.parametrize("second", [False, True])
def test_every_summand_is_held_and_the_tightest_norm_counts(second: bool) -> None:
    table = two_scans(second=second)
    assert ("norm-outgrown", "o") not in kinds(table)
    for role in ("q", "k_one", "k_two"):
        assert table.rule(role).lr == -HALF


@pytest.mark.parametrize("name", ["gated_deltanet", "deltanet", "gated_linear_attention", "mamba2", "transformer"])
@pytest.mark.parametrize("scaling", ["heads-fixed", "head-dim-fixed"])
def test_late_rates_are_those_of_the_model_as_it_begins(name: str, scaling: str) -> None:
    """What throughout rests on: past the crossovers multipliers may differ, but rates do not."""
    graph = architecture(name, scaling=scaling)
    begun = derive(graph, "sgd")
    fix = {f"{rule.role}.init_std": rule.init_std for rule in begun.rules if rule.init_std is not None}
    fix |= {f"{rule.role}.multiplier": rule.multiplier for rule in begun.rules if rule.multiplier}
    assert rates(derive(graph, "sgd", regime="asymptotic", fix=fix)) == rates(derive(graph, "sgd", regime="asymptotic"))
