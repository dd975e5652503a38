"""The check on models small enough for tests: correct rules pass, planted faults do not."""

import json
import math
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from sympy import Rational

from widthwise.cli import cli
from widthwise.codegen.request import Request
from widthwise.derive import DeriveError, Graph, RuleTable, architecture, derive
from widthwise.verify.coord import files, show
from widthwise.verify.coord.alignment import align, obeys
from widthwise.verify.coord.check import Report, coordinate_check
from widthwise.verify.coord.described import Described
from widthwise.verify.coord.emitted import Emitted, locals_of
from widthwise.verify.coord.predict import predictions
from widthwise.verify.coord.run import Diverged, measure
from widthwise.verify.coord.subject import Snapshot

WIDTHS, BASE = (64, 128, 256), 64


@cache
def derived(optimizer: str = "adamw", tied: bool = False) -> tuple[Request, Graph, RuleTable]:
    request = Request("gated_deltanet", optimizer, tied=tied)
    graph = request.graph()
    return request, graph, request.table(graph)


def check(optimizer: str, role: str = "", knob: str = "", by: str = "0", seeds: int = 4) -> Report:
    _, graph, right = derived(optimizer)
    rules = tuple(
        replace(rule, **{knob: getattr(rule, knob) + Rational(by)}) if rule.role == role else rule
        for rule in right.rules
    )
    subject = Described(graph, replace(right, rules=rules), BASE)
    return coordinate_check(
        subject, predictions(graph, right), WIDTHS, seeds=range(seeds), follows_gradient=optimizer == "sgd"
    )


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_correct_rules_pass(optimizer: str) -> None:
    report = check(optimizer, seeds=10)
    assert report.passed, report.findings
    assert len(report.results) > 200
    assert report.counts["ok"] > 0.7 * len(report.results)


@pytest.mark.parametrize(
    ("optimizer", "role", "knob", "by", "told"),
    [
        ("adamw", "q_proj", "lr", "1/2", "learning rate is n^0.50 too large"),
        ("sgd", "A_log", "lr", "-1/2", "learning rate is n^0.50 too small"),
        ("adamw", "up_proj", "init_std", "1/2", "init std is n^0.50 too large"),
        ("adamw", "o_scale", "multiplier", "-1/2", "o_scaled is"),
        ("sgd", "lm_head", "multiplier", "1/2", "logits is"),
    ],
)
def test_planted_faults_fail_and_are_named(optimizer: str, role: str, knob: str, by: str, told: str) -> None:
    report = check(optimizer, role, knob, by, seeds=3)
    assert not report.passed
    assert any(told in line for line in report.findings), report.findings


def test_a_wrong_power_of_the_logarithm_shows() -> None:
    """Steps are held against the power of n alone, the number of channels' say at each width taken out."""
    graph = architecture("gated_deltanet")
    right = derive(graph, "sgd", "largest-channel")
    forgotten = replace(
        right, rules=tuple(replace(rule, lr_log=None) if rule.role == "o_proj" else rule for rule in right.rules)
    )
    slopes = {}
    for name, table in (("right", right), ("forgotten", forgotten)):
        subject = Described(graph, table, BASE)
        seen = coordinate_check(
            subject, predictions(graph, right), WIDTHS, seeds=range(2), steps=1, follows_gradient=True
        )
        (slopes[name],) = (each.slope.value for each in seen.results if (each.kind, each.name) == ("step", "o_proj"))
        assert all(each.crowded is None for each in predictions(graph, right) if each.kind not in ("step", "own step"))
    counted = math.log(math.log(256) / math.log(64)) / math.log(4)  # H*d_v: 64 channels at the base width
    assert slopes["right"] == pytest.approx(0, abs=0.01)
    assert slopes["forgotten"] == pytest.approx(1.5 * counted, abs=0.05)


def test_a_small_power_of_the_logarithm_that_is_forgotten_is_a_drift() -> None:
    """Over four times the width (ln N)^-3/5 is n^-0.1: no other exponent, but it is seen."""
    graph = architecture("gated_deltanet")
    right = derive(graph, "sgd", "carrying-channel")
    rules = tuple(replace(rule, lr_log=None) if rule.role == "up_proj" else rule for rule in right.rules)
    subject = Described(graph, replace(right, rules=rules), BASE)
    seen = coordinate_check(subject, predictions(graph, right), WIDTHS, seeds=range(2), steps=1, follows_gradient=True)
    (step,) = (each for each in seen.results if (each.kind, each.name) == ("step", "up_proj"))
    assert step.verdict == "drift"
    assert step.slope.value > 0.1


def test_own_and_upstream_make_up_the_change() -> None:
    _, graph, table = derived()
    subject = Described(graph, table, BASE, dtype=torch.float64)
    model, batch = subject.make(128, 0), subject.batch(0)

    def look() -> Snapshot:
        tensors = {name: each.detach() for name, each in model.forward(batch).items()}
        return Snapshot(tensors, {role: each.detach().clone() for role, each in model.parameters.items()})

    before = look()
    model.forward(batch)["loss"].backward()
    model.optimizer.step()
    after = look()
    effects = {each.name: each for each in model.effects(before, after, batch)}
    for name, tensor in (("q_proj in z_q", "z_q"), ("k_conv1d in k_conv", "k_conv"), ("lm_head in logits", "logits")):
        change = after.tensors[tensor] - before.tensors[tensor]
        # before: ΔW at the input as it is now, and W₀ at the input's change: exactly the whole
        upstream = effects[name].upstream
        assert upstream is not None
        torch.testing.assert_close(effects[name].own + upstream, change)
    torch.testing.assert_close(effects["A_log"].own, after.parameters["A_log"] - before.parameters["A_log"])


def test_the_generated_model_shows_the_tensors_of_the_description() -> None:
    request, graph, table = derived()
    eps = 1e-6  # of the kernel's own normalization
    subject = Emitted(graph, table, BASE, dtype=torch.float64, norm_eps=eps, request=request)
    model, batch = subject.make(128, 0), subject.batch(0)
    seen = model.forward(batch)
    described = Described(graph, table, BASE, dtype=torch.float64, norm_eps=eps)
    other = described.make(128, 0)
    with torch.no_grad():
        for role, value in other.parameters.items():
            value.copy_(model.parameters[role])
    expected = other.forward(batch)
    assert set(graph.named) - {"S"} <= set(seen)
    for name in sorted(set(graph.named) - {"S"}):
        torch.testing.assert_close(seen[name].flatten(), expected[name].flatten(), rtol=1e-6, atol=1e-9)
    seen["loss"].backward()
    assert seen["z_q"].grad is not None


def test_nothing_stays_behind() -> None:
    request, graph, table = derived()
    subject = Emitted(graph, table, BASE, request=request)
    before = sys.getprofile()
    with pytest.raises(RuntimeError), locals_of(subject.modules[0], {}):
        raise RuntimeError
    assert sys.getprofile() is before


def test_divergence_names_tensor_width_and_step() -> None:
    _, graph, table = derived("sgd")
    with pytest.raises(Diverged, match=r"x is not finite \(change, width 64, step 1\)"):
        measure(Described(graph, table, BASE, lr=1e38), WIDTHS, [0])


def test_rules_for_another_graph_are_refused() -> None:
    _, graph, table = derived()
    with pytest.raises(DeriveError, match="none for"):
        predictions(graph, replace(table, rules=table.rules[1:]))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("tied", [False, True])
def test_absorbing_a_multiplier_moves_only_what_lies_between(optimizer: str, tied: bool) -> None:
    graph = architecture("gated_deltanet", tied=tied)
    here, there = (
        {each.key: each.exponent for each in predictions(graph, derive(graph, optimizer, gauge=gauge))}
        for gauge in ("multiplier", "absorbed")
    )
    moved = {key: there[key] - here[key] for key in here if there[key] != here[key]}
    owner, lr = ("norm" if tied else "lm_head"), (-1.0 if optimizer == "adamw" else -2.0)
    expected = {("weight", owner): -1.0, ("weight gradient", owner): 1.0, ("step", owner): lr}
    if tied:  # into the final norm's gain, so that its output, too, is n times smaller
        expected |= {("own step", owner): -1.0, ("forward", "x_final"): -1.0, ("gradient", "x_final"): 1.0}
        expected |= {("change", "x_final"): -1.0}
    scaled = {("forward", "o_scaled"): -0.5, ("gradient", "o_scaled"): 0.5, ("change", "o_scaled"): -0.5}
    assert moved == expected | scaled  # the multiplier in front of the output norm goes into that norm's eps


def test_interruption_keeps_whole_seeds() -> None:
    _, graph, table = derived()
    calls = iter(range(100))

    def stop() -> None:
        if next(calls) == 7:
            raise KeyboardInterrupt

    report = coordinate_check(Described(graph, table, BASE), predictions(graph, table), WIDTHS, steps=1, progress=stop)
    assert report.interrupted
    assert report.seeds == 2


def test_files_are_whole_and_plain(tmp_path: Path) -> None:
    report = check("adamw", seeds=2)
    files.write_json(report, tmp_path / "check.json")
    read = json.loads((tmp_path / "check.json").read_text(encoding="utf-8"))
    assert read["counts"] == report.counts
    assert len(read["results"]) == len(report.results)
    assert [path.name for path in tmp_path.iterdir()] == ["check.json"]
    with pytest.raises(DeriveError, match="cannot write"):
        files.write_json(report, tmp_path / "no" / "check.json")
    assert list(show.terminal(report))


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert files.write_plot(check("adamw", seeds=2), tmp_path / "check.png")
    assert (tmp_path / "check.png").read_bytes()[:4] == b"\x89PNG"


def test_own_steps_are_coherent_at_the_first_step() -> None:
    _, graph, table = derived("sgd")
    measured, _ = align(Described(graph, table, BASE), WIDTHS, range(3), [1])
    verdicts = {each.name: each.verdict for each in measured if each.kind == "own step"}
    assert set(verdicts.values()) <= {"coherent", "unresolved"}
    assert verdicts["q_proj in z_q"] == "coherent"
    assert "unaligned" not in obeys(measured)


def test_command_line(tmp_path: Path) -> None:
    wide = "coord-check gated_deltanet --optimizer sgd --widths 64 128 256 --seeds 2 --steps 1 --no-plot -o"
    ran = CliRunner().invoke(cli, [*wide.split(), str(tmp_path)])
    assert ran.exit_code in (0, 1), ran.output
    assert "ΔW·x" in ran.output
    assert (tmp_path / "coord_check.json").exists()
    refused = CliRunner().invoke(cli, ["coord-check", "gated_deltanet", "--widths", "64", "64"])
    assert refused.exit_code == 2
    assert "must differ" in refused.output
