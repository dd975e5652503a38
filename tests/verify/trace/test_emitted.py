"""Models that widthwise emitted, traced back: the rules are those they were emitted with."""

import importlib.util
import inspect
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from widthwise.codegen.render import render
from widthwise.codegen.request import Request
from widthwise.derive import Graph, derive
from widthwise.derive.graph_toml import write_graph
from widthwise.verify.trace import trace

KNOBS = ("init_std", "multiplier", "lr", "weight_decay", "eps")
FIXED = {"depth": 3, "vocab": 96, "taps": 4, "features": 6, "classes": 5, "G": 2, "ffn": 384}
HEADS = {
    None: {"H": 4, "d_k": 32, "d_v": 64, "d_head": 32},
    "heads-fixed": {"H": 4, "d_k": 32, "d_v": 64, "d_head": 32},
    "head-dim-fixed": {"H": 8, "d_k": 16, "d_v": 24, "d_head": 16},
}
VARIANTS = [
    Request("gated_deltanet"),
    Request("gated_deltanet", scaling="head-dim-fixed"),
    Request("gated_deltanet", scaling="head-dim-fixed", options=("value_groups=on",)),
    Request("gated_deltanet", tied=True),
    Request("gated_deltanet", options=("activation=off",)),
    Request("gated_deltanet", options=("conv=off", "gate=off", "mlp=off")),
    Request("gated_deltanet", options=("decay=off", "qk_scale=d_k^-1/2")),
    Request("gated_deltanet", options=("o_scale=off",)),
    Request("deltanet"),
    Request("transformer"),
    Request("transformer", scaling="head-dim-fixed", options=("gqa=on", "qk_norm=on")),
    Request("mlp"),
]


def imported(text: str, file: Path) -> Any:
    file.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return module


def emitted(request: Request, folder: Path) -> tuple[Graph, Any]:
    """The traced graph of the emitted model, and what makes the model at a width."""
    module = imported(render(request, "model"), folder / "emitted_model.py")
    (model,) = (each for each in vars(module).values() if isinstance(each, type) and hasattr(each, "widened"))
    sizes = {"width": 128, "n": 128} | FIXED | HEADS[request.scaling]
    known = inspect.signature(model.__init__).parameters
    sizes = {name: size for name, size in sizes.items() if name in known}

    def make(width: int) -> Any:
        return model(**model.widened(width, **sizes))

    def example() -> torch.Tensor:
        return torch.zeros(2, 6) if request.architecture == "mlp" else torch.zeros(2, 6, dtype=torch.long)

    return trace(lambda width: (make(width), (example(),))).graph, make


@pytest.mark.parametrize("request_", VARIANTS, ids=lambda each: each.arguments)
def test_rules_come_back(request_: Request, tmp_path: Path) -> None:
    graph, _ = emitted(request_, tmp_path)
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
    graph, make = emitted(Request("gated_deltanet"), tmp_path)
    file = tmp_path / "model.toml"
    file.write_text(write_graph(graph), encoding="utf-8")
    own = imported(render(Request(str(file))), tmp_path / "traced_rules.py")
    described = imported(render(Request("gated_deltanet")), tmp_path / "described_rules.py")
    one, two = make(256), make(256)
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
