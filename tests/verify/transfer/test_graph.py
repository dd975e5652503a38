"""Steps replayed as a CUDA graph give the numbers of steps as they come."""

from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from widthwise.codegen.request import Request  # noqa: E402
from widthwise.verify.transfer import execute, step, train  # noqa: E402
from widthwise.verify.transfer.config import Run, Training  # noqa: E402

TRAINING = Training(steps=60, batch=4, length=128, warmup=6, bf16=True, validation=2)


def run(optimizer: str = "adamw", lr: float = 0.01, **training: Any) -> Run:
    sizes = {"depth": 2, "H": 2, "d_k": 16, "d_v": 32, "ffn": 128, "width": 64}
    request = Request("gated_deltanet", optimizer=optimizer, scaling="heads-fixed")
    return Run("widthwise", 128, lr, 0, request, 64, sizes, replace(TRAINING, **training), "stdlib", "")


@pytest.mark.gpu
@pytest.mark.parametrize("training", [{}, {"accumulate": 2}, {"checkpoint": True}, {"bf16": False}], ids=str)
@pytest.mark.parametrize(("optimizer", "lr"), [("adamw", 0.01), ("sgd", 0.1)])
def test_a_graph_changes_no_loss(optimizer: str, lr: float, training: dict[str, Any]) -> None:
    replayed = train.train(run(optimizer, lr, **training))
    expected = train.train(run(optimizer, lr, graph=False, **training))
    assert (replayed["graph"], expected["graph"]) == (True, False), replayed.get("note")
    assert replayed["losses"] == pytest.approx(expected["losses"], abs=2e-3)
    assert replayed["loss"] == pytest.approx(expected["loss"], abs=2e-3)
    assert replayed["losses"][0] - replayed["losses"][-1] > 0.5  # or equal losses would say little


@pytest.mark.gpu
def test_divergence_is_found_in_a_graph() -> None:
    outcome = train.train(run(lr=1e30))
    assert (outcome["graph"], outcome["loss"]) == (True, None)
    assert outcome["diverged"] is not None


@pytest.mark.gpu
def test_what_cannot_be_captured_is_said_and_done_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = step.loss_of

    def waits(*arguments: Any) -> Any:
        loss = plain(*arguments)
        loss.item()  # which no graph can hold
        return loss

    monkeypatch.setattr(step, "loss_of", waits)
    outcome = train.train(run())
    assert outcome["graph"] is False
    assert "no CUDA graph" in outcome["note"]
    monkeypatch.undo()
    assert outcome["loss"] == pytest.approx(train.train(run(graph=False))["loss"], abs=2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [True, False])
def test_short_memory_fails_a_run_and_not_the_next(graph: bool) -> None:
    small = run(steps=4, graph=graph)
    assert "loss" in execute.attempt(small)
    torch.cuda.set_per_process_memory_fraction(0.001)
    try:
        outcome = execute.attempt(replace(small, width=4096))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of memory: run fewer at a time" in outcome[execute.FAILED]
    assert execute.attempt(small)["graph"] is graph


@pytest.mark.gpu
def test_compiled_steps_are_not_captured() -> None:
    assert train.train(run(compile=True, steps=4))["graph"] is False


def test_how_a_run_is_carried_out_is_no_part_of_it() -> None:
    assert run().key == run(graph=False).key
    assert run().key != run(clip=0.5).key
