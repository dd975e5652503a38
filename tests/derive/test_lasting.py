"""``--regime throughout``: learning rates that hold before and past the crossovers."""

import pytest

from widthwise.derive import DeriveError, RuleTable, architecture, derive
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
