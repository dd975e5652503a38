"""The coordinate check passes on every traced class and emitted variant, under the rules derived from its trace.

Ten and more seeds, and wider models: docs/results/tracing.md.
"""

import math

import pytest
import torch
from checked_models import BASE, CLASSES, VARIANTS, Checked

from widthwise.codegen.request import Request
from widthwise.derive import derive
from widthwise.derive.graph_toml import write_graph
from widthwise.verify.coord.check import Report, coordinate_check
from widthwise.verify.coord.predict import predictions

WIDTHS = (64, 128, 256)
KINDS = {"forward", "gradient", "weight", "weight gradient", "step", "own step", "upstream", "change"}


def checked(model: Checked, seeds: int = 5, steps: int = 2) -> Report:
    predicted = predictions(model.graph, model.table)
    return coordinate_check(model.factory(), predicted, WIDTHS, seeds=range(seeds), steps=steps)


@pytest.fixture
def reports(traced, tmp_path, _reports: dict[str, Report]):
    """``reports("llama")``: the check of that class, made once."""

    def made(name: str) -> Report:
        if name not in _reports:
            file = tmp_path / f"{name}.toml"
            file.write_text(write_graph(traced(name).graph), encoding="utf-8")
            seeds = 3 if name in ("cnn", "resnet") else 5  # images are slow, and seeds agree
            _reports[name] = checked(Checked(name, graph_file=file), seeds)
        return _reports[name]

    return made


@pytest.fixture(scope="module")
def _reports() -> dict[str, Report]:
    return {}


@pytest.mark.parametrize("name", CLASSES)
def test_classes_pass(reports, name: str) -> None:
    report = reports(name)
    assert report.passed, report.findings
    assert {each.kind for each in report.results} == KINDS
    assert report.counts["ok"] > 0.75 * len(report.results)


def test_gates_that_start_small(reports) -> None:
    """B and C of Mamba-2 start at n^-1/2 and are brought to n^0: until then the time step's gradient is n^-2."""
    found = {(each.kind, each.name): each for each in reports("mamba2").results}
    assert found["weight gradient", "in_proj_4"].predicted == -2.0
    assert found["weight gradient", "in_proj_4"].slope.value < -1.5


def test_routers(reports) -> None:
    """A router's row moves the tokens that it is made of by Θ(1), and no others."""
    steps = [each for each in reports("qwen3_next").results if each.kind == "own step" and each.name.startswith("gate")]
    assert {each.name for each in steps} >= {"gate in z_gate", "gate_2 in z_gate_2"}
    assert all(abs(each.slope.value) < 0.3 for each in steps)


def test_rows_are_seen_one_by_one(reports, traced, tmp_path) -> None:
    """Parts of packed weights: their values, gradients and steps, and their parts of outputs."""
    graph = traced("qwen3_next").graph
    file = tmp_path / "model.toml"
    file.write_text(write_graph(graph), encoding="utf-8")
    run = Checked("qwen3_next", graph_file=file).factory().make(BASE, 0)
    parts = [run.parameters[f"in_proj_qkvz_{part}"] for part in range(4)]
    packed_weight = run.model.model.layers[0].linear_attn.in_proj_qkvz.weight
    group = packed_weight.unflatten(0, (BASE // 32, -1))[0]  # one key head: q, k, and v, z of two value heads
    assert [part.shape[0] for part in parts] == [32, 32, 96, 96]
    assert torch.equal(torch.cat([part[: part.shape[0] // 2] for part in parts]), group)
    packed = {role for role, parameter in graph.parameters.items() if parameter.rows is not None}
    seen = [each for each in reports("qwen3_next").results if each.name.split(" in ")[0] in packed]
    assert {each.name for each in seen if each.kind == "weight"} == packed
    assert {"weight", "step", "weight gradient", "own step"} <= {each.kind for each in seen}


def test_channels_are_counted_in_packed_weights(traced, tmp_path) -> None:
    """Of a factory's models the number of channels is read off the rows that a role has of a larger tensor."""
    file = tmp_path / "model.toml"
    file.write_text(write_graph(traced("qwen3_next").graph), encoding="utf-8")
    model = Checked("qwen3_next", graph_file=file)
    factory = model.factory()
    factory.make(4 * BASE, 0)
    table = derive(model.graph, "sgd", "largest-channel")
    rows = {role for role, parameter in model.graph.parameters.items() if parameter.rows is not None}
    crowded = [rule for rule in table.rules if rule.lr_log is not None and rule.role in rows]
    assert crowded
    for rule in crowded:
        run = factory.make(4 * BASE, 0)
        axis = [str(group) for group in model.graph.parameters[rule.role].shape].index(rule.channels)
        now = run.parameters[rule.role].shape[axis]
        assert factory.slowed(rule, 4 * BASE) == pytest.approx(
            (math.log(now) / math.log(now / 4)) ** float(rule.lr_log)
        )


def test_a_wrong_init_fails(traced, tmp_path) -> None:
    """The check can fail on a traced class, and says what is wrong."""
    file = tmp_path / "llama.toml"
    file.write_text(write_graph(traced("llama").graph), encoding="utf-8")
    right = Checked("llama", graph_file=file)
    wrong = Checked("llama", graph_file=file)
    rule = next(rule for rule in wrong.rules.RULES if rule.role == "o_proj")
    object.__setattr__(rule, "init_std", 0.0)
    report = coordinate_check(wrong.factory(), predictions(right.graph, right.table), WIDTHS, seeds=range(3), steps=1)
    assert any("o_proj is drawn as n^-0.00" in line or "o_proj is drawn as n^0.00" in line for line in report.findings)


@pytest.mark.parametrize(
    "request_",
    [pytest.param(each, marks=[] if place in (2, 9) else pytest.mark.slow) for place, each in enumerate(VARIANTS)],
    ids=lambda each: each.arguments,
)
def test_emitted_variants_pass(request_: Request) -> None:
    report = checked(Checked(request_), seeds=8)
    assert report.passed, report.findings
