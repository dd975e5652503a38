"""Packed models in training: rows of their weights have the sizes that the traced rules say, and changes stay Θ(1)."""

from math import log2

import pytest
import torch
import traced_models

from widthwise.derive import derive

WIDTHS, BASE, SEEDS = (64, 128, 256), 64, 6


def slope(sizes: list[float]) -> float:
    """Of log size over log width, from the ends: each width is twice the last."""
    return log2(sizes[-1] / sizes[0]) / (len(sizes) - 1)


def rms(x: torch.Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def measured(module, make, width: int, seed: int) -> dict[tuple[str, str], float]:
    """Sizes by (what, role or module): initial rows, their gradients, and changes of every linear map's output."""
    torch.manual_seed(seed)
    model = make(width)[0]
    model.lm_head_multiplier = 1.0
    model.lm_head.register_forward_hook(lambda _, __, out: out * model.lm_head_multiplier)
    module.init_(model, width=width, base_width=BASE, seed=seed)
    tokens = torch.randint(0, 96, (4, 32), generator=torch.Generator().manual_seed(seed))
    outputs: dict[str, torch.Tensor] = {}
    for name, each in model.named_modules():
        if isinstance(each, torch.nn.Linear):
            each.register_forward_hook(lambda _, __, out, name=name: outputs.update({name: out.detach()}))
    optimizer = torch.optim.AdamW(module.param_groups(model, lr=1e-3, width=width, base_width=BASE))
    found: dict[tuple[str, str], float] = {}
    for step in range(2):
        logits = model(input_ids=tokens).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        if step == 0:
            before = dict(outputs)
            for each in module._find(model, width, BASE, module.SCALING):
                for piece in each.pieces:
                    value, gradient = each.parameter.detach(), each.parameter.grad
                    if piece.rows is not None:
                        at = piece.rows
                        value, gradient = (
                            x.reshape(-1, at.period, *x.shape[at.axis + 1 :])[:, at.start : at.start + at.size]
                            for x in (value, gradient)
                        )
                    key = piece.rule.role
                    found.setdefault(("init", key), rms(value))
                    found.setdefault(("gradient", key), rms(gradient))
            optimizer.step()
            optimizer.zero_grad()
    found |= {("change", name): rms(out - before[name]) for name, out in outputs.items()}
    return found


# Gradients are predicted as large as training makes what they are products of (docs/theory.md); B and C of Mamba-2
# start at n^-1/2 and their gradients, and all through them, below that. The final gain's is known to fall somewhat
# faster at these widths (widthwise coord-check calls it drift).
@pytest.mark.parametrize(("name", "gradients"), [("mamba2", False), ("qwen3_next", True)])
def test_rows_follow_their_rules(generated, traced, name: str, gradients: bool) -> None:
    module, _ = generated(name, gauge="multiplier")
    make = getattr(traced_models, name)
    runs = [[measured(module, make, width, seed) for seed in range(SEEDS)] for width in WIDTHS]
    table = derive(traced(name).graph)
    off = {}
    for what, key in runs[0][0]:
        sizes = [sum(run[what, key] for run in at_width) / SEEDS for at_width in runs]
        if what == "change":
            if slope(sizes) > 0.15:
                off[what, key] = slope(sizes)
            continue
        rule = table.rule(key)
        expected = rule.init_std if what == "init" else rule.eps
        law = traced(name).graph.parameters[key].law
        if what == "init" and (not law.symmetric or min(sizes) == 0):
            continue
        if what == "gradient" and not gradients:
            continue
        if abs(slope(sizes) - float(expected)) > (0.4 if key == "model_norm" else 0.25):
            off[what, key] = (slope(sizes), float(expected))
    assert not off


def test_the_coordinate_check_sees_rows(generated, traced) -> None:
    """Rows of packed weights, and their parts of outputs, are checked one by one."""
    from widthwise.verify.coord.check import coordinate_check
    from widthwise.verify.coord.factory import Factory
    from widthwise.verify.coord.predict import predictions

    module, _ = generated("qwen3_next", gauge="multiplier")
    graph = traced("qwen3_next").graph
    table = derive(graph)

    def make(width: int) -> torch.nn.Module:
        model = traced_models.qwen3_next(width)[0]
        model.lm_head_multiplier = 1.0
        model.lm_head.register_forward_hook(lambda _, __, out: out * model.lm_head_multiplier)
        module.init_(model, width=width, base_width=BASE, seed=torch.initial_seed() % 2**31)
        return model

    factory = Factory("own:make", make, graph, table, BASE)
    run = factory.make(BASE, 0)
    parts = [run.parameters[f"in_proj_qkvz_{part}"] for part in range(4)]
    packed_weight = run.model.model.layers[0].linear_attn.in_proj_qkvz.weight
    group = packed_weight.unflatten(0, (BASE // 32, -1))[0]  # one key head: q, k, and v, z of two value heads
    assert [part.shape[0] for part in parts] == [32, 32, 96, 96]
    assert torch.equal(torch.cat([part[: part.shape[0] // 2] for part in parts]), group)
    report = coordinate_check(factory, predictions(graph, table), WIDTHS, seeds=range(3), steps=1)
    packed = {role for role, parameter in graph.parameters.items() if parameter.rows is not None}
    seen = [each for each in report.results if each.name.split(" in ")[0] in packed]
    assert {each.name for each in seen if each.kind == "weight"} == packed
    assert {"weight", "step", "weight gradient", "own step"} <= {each.kind for each in seen}
    assert [each for each in seen if each.verdict == "fail" and each.kind != "weight gradient"] == []
    weights = {each.name: each.slope.value for each in seen if each.kind == "weight"}
    assert weights["in_proj_qkvz_0"] == pytest.approx(-0.5, abs=0.05)
