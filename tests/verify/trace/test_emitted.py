"""Models that widthwise emitted, traced back: the rules are those they were emitted with."""

from pathlib import Path

import pytest
import torch
from checked_models import VARIANTS, emitted, imported

from widthwise.codegen.render import render
from widthwise.codegen.request import Request
from widthwise.derive import derive
from widthwise.derive.graph_toml import write_graph
from widthwise.verify.trace import trace

KNOBS = ("init_std", "multiplier", "lr", "weight_decay", "eps")


@pytest.mark.parametrize("request_", VARIANTS, ids=lambda each: each.arguments)
def test_rules_come_back(request_: Request, tmp_path: Path) -> None:
    graph = trace(emitted(request_, tmp_path)).graph
    for optimizer in ("adamw", "sgd"):
        mine, theirs = derive(graph, optimizer), derive(request_.graph(), optimizer)
        described = {rule.role: rule for rule in theirs.rules}
        for rule in mine.rules:
            # the tracer leaves a place for a multiplier where the model has a factor of its own, and behind a scan
            if rule.role in ("attn_factor", "logits_scale", "o_scale") and rule.role not in described:
                continue
            other = described.pop(rule.role)
            assert [getattr(rule, knob) for knob in KNOBS] == [getattr(other, knob) for knob in KNOBS], rule.role
        assert set(described) <= ({"lm_head"} if request_.tied else {"attn_scale"})


def test_generates_for_the_emitted_model(tmp_path: Path) -> None:
    """The multipliers of the traced graph are where the emitted model has them."""
    make = emitted(Request("gated_deltanet"), tmp_path)
    graph = trace(make).graph
    file = tmp_path / "model.toml"
    file.write_text(write_graph(graph), encoding="utf-8")
    own = imported(render(Request(str(file))), tmp_path, "traced_rules")
    described = imported(render(Request("gated_deltanet")), tmp_path, "described_rules")
    one, two = make(256)[0], make(256)[0]
    reports = [rules.init_(model, width=256, base_width=64) for rules, model in ((own, one), (described, two))]
    assert {each.name for each in reports[0]} == {each.name for each in reports[1]}
    assert one.model.layers[1].attn.o_scale == two.model.layers[1].attn.o_scale == 2.0
    assert one.lm_head_multiplier == two.lm_head_multiplier == 0.25
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, two.get_parameter(name)), name
    groups = [
        {(g["lr"], g["weight_decay"], g["eps"]) for g in rules.param_groups(model, lr=1.0, width=256, base_width=64)}
        for rules, model in ((own, one), (described, two))
    ]
    assert groups[0] == groups[1]
