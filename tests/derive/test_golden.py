"""Whole tables as text a person can review; rewrite them with ``pytest --update-goldens`` and read the diff."""

from pathlib import Path

import pytest

from widthwise.derive import architecture, derive
from widthwise.derive.render import markdown

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = [
    *(
        (f"gated_deltanet-{optimizer}-{scaling}", "gated_deltanet", optimizer, {"scaling": scaling}, {})
        for optimizer in ("adamw", "sgd")
        for scaling in ("heads-fixed", "head-dim-fixed", "mixed")
    ),
    ("gated_deltanet-sgd-asymptotic", "gated_deltanet", "sgd", {}, {"regime": "asymptotic"}),
    ("gated_deltanet-adamw-tied-absorbed", "gated_deltanet", "adamw", {"tied": True}, {"gauge": "absorbed"}),
    ("transformer-adamw", "transformer", "adamw", {"gqa": True}, {}),
    ("transformer-sgd-qk-norm", "transformer", "sgd", {"qk_norm": True}, {}),
    ("mlp-muon", "mlp", "muon", {}, {}),
    ("deltanet-adamw", "deltanet", "adamw", {}, {}),
    ("gated_linear_attention-adamw", "gated_linear_attention", "adamw", {}, {}),
    ("mamba2-adamw", "mamba2", "adamw", {}, {}),
]


@pytest.mark.parametrize(("name", "which", "optimizer", "options", "request_"), CASES, ids=[case[0] for case in CASES])
def test_golden(
    name: str, which: str, optimizer: str, options: dict, request_: dict, pytestconfig: pytest.Config
) -> None:
    text = markdown(derive(architecture(which, **options), optimizer, **request_))
    path = GOLDEN / f"{name}.md"
    if pytestconfig.getoption("--update-goldens"):
        path.write_text(text, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == text
