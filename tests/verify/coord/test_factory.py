"""Somebody's own factory, seen from outside."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from widthwise.codegen.request import Request
from widthwise.derive import DeriveError, Graph, RuleTable, derive
from widthwise.derive.toml_io import write_toml
from widthwise.verify.coord.check import Report, coordinate_check
from widthwise.verify.coord.factory import Factory, described_by
from widthwise.verify.coord.predict import predictions
from widthwise.verify.loading import imported

WIDTHS, BASE = (64, 128, 256), 64


@cache
def generated(gauge: str = "multiplier", tied: bool = False) -> tuple[Any, Any, Graph, RuleTable]:
    from widthwise.codegen.render import render

    request = Request("gated_deltanet", gauge=gauge, tied=tied)
    graph = request.graph()
    modules = imported(render(request, "model"), "own_model"), imported(render(request), "own_rules")
    return *modules, graph, request.table(graph)


def make_model(width: int, gauge: str = "multiplier", tied: bool = False) -> nn.Module:
    model, rules, _, _ = generated(gauge, tied)
    sizes = {"width": BASE, "depth": 1, "vocab": 32, "H": 2, "d_k": 32, "d_v": 32, "ffn": 64}
    made: nn.Module = model.GatedDeltaNetLM(**model.GatedDeltaNetLM.widened(width, **sizes), norm_eps=1e-12)
    rules.init_(made, width=width, base_width=BASE, seed=torch.initial_seed() % 2**31, norm_eps=1e-12)
    if tied:
        made.lm_head_multiplier /= BASE**0.5  # see the finding tied-readout
    return made


def with_optimizer(width: int, wrong: bool = False) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = make_model(width)
    if wrong:
        return model, torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    groups = generated()[1].param_groups(model, lr=1e-3, eps=1e-12, width=width, base_width=BASE)
    return model, torch.optim.AdamW(groups)


def check(make: Callable[[int], Any], seeds: int = 3, gauge: str = "multiplier", tied: bool = False) -> Report:
    _, _, graph, table = generated(gauge, tied)
    factory = Factory("own:make", make, graph, table, BASE)
    return coordinate_check(factory, predictions(graph, table), WIDTHS, seeds=range(seeds), steps=1)


@pytest.mark.parametrize("make", [make_model, with_optimizer, lambda width: torch.compile(make_model(width))])
def test_correct_models_pass(make: Callable[[int], Any]) -> None:
    report = check(make)
    assert report.passed, report.findings
    assert {each.kind for each in report.results} == {
        "forward", "gradient", "weight", "weight gradient", "step", "own step", "upstream", "change",
    }  # fmt: skip


def test_rules_in_the_absorbed_gauge() -> None:
    """Tensors have the sizes of the gauge that the rules are in; a class takes them as it is."""
    from widthwise.codegen.render import render

    request = Request("gated_deltanet", gauge="absorbed", tied=True)
    graph = request.graph()
    table = request.table(graph)
    model, rules = imported(render(request, "model"), "tied_model"), imported(render(request), "absorbed_rules")

    def make(width: int) -> nn.Module:
        sizes = {"width": BASE, "depth": 1, "vocab": 32, "H": 2, "d_k": 32, "d_v": 32, "ffn": 64}
        made: nn.Module = model.GatedDeltaNetLM(**model.GatedDeltaNetLM.widened(width, **sizes))
        seed = torch.initial_seed() % 2**31
        rules.init_(made, width=width, base_width=BASE, seed=seed, norm_eps=1e-12)
        return made

    predicted = {each.key: each for each in predictions(graph, table)}
    assert predicted["weight", "norm"].exponent == -1.0  # it has taken the readout's multiplier
    report = coordinate_check(
        Factory("own:make", make, graph, table, BASE), tuple(predicted.values()), WIDTHS, seeds=range(4), steps=1
    )
    assert report.passed, report.findings
    assert any(each.name == "logits" for each in report.results)


def test_rules_that_need_the_number_of_channels() -> None:
    """Read off the shapes of the models that are made, for optimizers of the check's own and to be taken out again."""
    _, _, graph, _ = generated()
    table = derive(graph, "sgd", "largest-channel")
    factory = Factory("own:make", make_model, graph, table, BASE)
    run = factory.make(256, 0)
    rates = {id(group["params"][0]): group["lr"] for group in run.optimizer.param_groups}
    for role, channels, power in (("o_proj", 64, 1.5), ("k_conv1d", 64, 1.0), ("up_proj", 64, 0.5)):
        slowed = (math.log(channels) / math.log(4 * channels)) ** power
        assert factory.slowed(table.rule(role), 256) == pytest.approx(slowed)
        plain = 0.3 * 4 ** float(table.rule(role).lr)
        assert rates[id(run.named[role][1])] == pytest.approx(plain * slowed)
    assert factory.slowed(table.rule("lm_head"), 256) == 1.0
    report = coordinate_check(
        factory, predictions(graph, table), WIDTHS, seeds=range(6), steps=1, follows_gradient=True
    )
    assert report.passed, report.findings
    slopes = {each.name: each.slope.value for each in report.results if each.kind == "step"}
    assert slopes["o_proj"] == pytest.approx(0, abs=0.02)


def test_where_channels_are_counted() -> None:
    """Along the axis of the description, whichever it is in the model; axes of one that the model has besides aside."""
    model, _, graph, _ = generated()
    table = derive(graph, "sgd", "largest-channel")
    sizes = {"width": BASE, "depth": 1, "vocab": 32, "H": 2, "d_k": 16, "d_v": 32, "ffn": 80}
    cls = model.GatedDeltaNetLM
    factory = Factory("own:make", lambda width: cls(**cls.widened(width, **sizes)), graph, table, BASE)
    factory.make(128, 0)
    parameters = graph.parameters
    assert factory._entries(parameters["down_proj"], 0, 128) == 128
    assert factory._entries(parameters["down_proj"], 1, 128) == 160
    assert factory._entries(parameters["k_conv1d"], 1, 128) == 4  # taps: [channels, 1, taps] in the model
    backwards = replace(parameters["down_proj"], input_first=True)
    assert [factory._entries(backwards, axis, 128) for axis in (0, 1)] == [160, 128]
    for role, channels, power in (("o_proj", 64, 1.5), ("k_proj", 32, 1.0), ("down_proj", 80, 0.5)):
        expected = (math.log(channels) / math.log(2 * channels)) ** power
        assert factory.slowed(table.rule(role), 128) == pytest.approx(expected)


def test_channels_that_cannot_be_counted() -> None:
    _, _, graph, _ = generated()
    table = derive(graph, "sgd", "largest-channel")
    rules = tuple(replace(each, channels="H*taps") if each.role == "o_proj" else each for each in table.rules)
    factory = Factory("own:make", make_model, graph, replace(table, rules=rules), BASE)
    with pytest.raises(DeriveError, match=r"size of H\*taps, which no parameter has"):
        factory.make(64, 0)
    with pytest.raises(DeriveError, match=r"channels, H\*d_v, which would be 1"):
        table.rule("o_proj").slowed(4, 1)


def test_factors_with_the_number_of_channels() -> None:
    rule = derive(generated()[2], "sgd", "largest-channel").rule("v_conv1d")
    slowed = rule.slowed(256, 64)
    assert rule.factors(256, 64, slowed)["lr"] == pytest.approx(4 * (3 / 4) ** 1.5)
    assert rule.factors(256, 64, slowed)["weight_decay"] == pytest.approx((4 / 3) ** 1.5 / 4)
    assert rule.factors(64, 64, rule.slowed(64, 64)) == dict.fromkeys(rule.factors(64, 64, 1.0), 1.0)


def test_one_learning_rate_for_all_fails() -> None:
    report = check(partial(with_optimizer, wrong=True), seeds=2)
    assert any(
        line.startswith("q_proj steps as n^-0.00") or "q_proj steps as n^0.00" in line for line in report.findings
    )


@pytest.mark.parametrize("tied", [False, True])
def test_layers_that_absorbed_a_multiplier(tied: bool) -> None:
    """Nothing is multiplied outside of the layers, so the readout's output is seen too where a layer makes it."""
    report = check(partial(make_model, gauge="absorbed", tied=tied), 8, gauge="absorbed", tied=tied)
    assert report.passed, report.findings
    moved = "norm" if tied else "lm_head"  # what took in the multiplier n^-1 of the logits
    slopes = {(each.kind, each.name): each.slope.value for each in report.results}
    assert slopes["weight", moved] == pytest.approx(-1, abs=0.05)
    assert ("own step", "lm_head in logits") in slopes or tied
    mixed_up = check(partial(make_model, tied=tied), 2, gauge="absorbed", tied=tied)
    assert any(f"{moved} is drawn as n^0.00 where n^-1.00" in line for line in mixed_up.findings), mixed_up.findings


def test_hooks_are_removed() -> None:
    made = []

    def make(width: int) -> nn.Module:
        made.append(make_model(width))
        return made[-1]

    check(make, seeds=2)
    assert not any(module._forward_hooks for model in made for module in model.modules())


def _extra(width: int) -> nn.Module:
    model = make_model(width)
    if width > BASE:
        model.extra = nn.Parameter(torch.zeros(3))
    return model


def _unnamed(width: int) -> nn.Module:
    model = make_model(width)
    model.extra = nn.Parameter(torch.zeros(3))
    return model


def _boom(width: int) -> nn.Module:
    raise RuntimeError("boom")


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda width: make_model(BASE), "same shapes"),
        (_extra, "no rule names the parameter extra|extra is a parameter at width"),
        (_unnamed, "no rule names the parameter extra"),
        (_boom, "boom"),
        (lambda width: 3, "gave int, not a model"),
        (lambda width: nn.Linear(width, width), "no rule names the parameter weight"),
    ],
)
def test_unfit_factories_are_refused(make: Callable[[int], Any], told: str) -> None:
    with pytest.raises(DeriveError, match=told):
        check(make)


def test_rules_say_which_graph_they_are_about(tmp_path: Path) -> None:
    _, _, graph, table = generated()
    file = tmp_path / "rules.toml"
    file.write_text(write_toml(table), encoding="utf-8")
    read_graph, read_table = described_by(file, None)
    assert read_table == table
    assert read_graph.named == graph.named
    with pytest.raises(DeriveError, match=r"importing no\.such:thing failed: ModuleNotFoundError"):
        Factory.imported("no.such:thing", graph, table, BASE)
