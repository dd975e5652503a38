"""Modules generated from traced graphs initialize and group the real classes."""

import pytest
import torch

WIDTH, BASE = 192, 64


@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet", "llama", "qwen3", "gpt2", "mamba2", "qwen3_next"])
def test_initializes_and_groups_the_real_class(generated, name: str) -> None:
    module, model = generated(name)
    report = module.init_(model, width=WIDTH, base_width=BASE, norm_eps=1e-6)
    assert {each.name for each in report} == {each for each, _ in model.named_parameters()}
    groups = module.param_groups(model, lr=1.0, weight_decay=0.1, width=WIDTH, base_width=BASE)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    torch.optim.AdamW(groups)


def test_rows_of_packed_weights_are_drawn_by_their_rules(generated) -> None:
    module, model = generated("mamba2")
    module.init_(model, width=WIDTH, base_width=BASE)
    weight = model.backbone.layers[2].mixer.in_proj.weight
    inner, state = 2 * WIDTH, 16
    z, x, b, c, dt = weight.split([inner, inner, state, state, WIDTH // 16])
    for each in (z, x, dt):  # base std 64^(-1/2) times 3^(-1/2)
        assert each.std().item() == pytest.approx(WIDTH**-0.5, rel=0.05)
    for each in (b, c):  # few outputs: times 3^-1
        assert each.std().item() == pytest.approx(BASE**-0.5 / 3, rel=0.05)


def test_weights_stored_in_out(generated) -> None:
    """GPT-2 holds q, k, v side by side, [in, 3 out]; rules and reports are about [out, in]."""
    module, model = generated("gpt2", gauge="multiplier")
    report = {(each.name, each.role): each for each in module.init_(model, width=WIDTH, base_width=BASE)}
    up = model.transformer.h[1].mlp.c_fc.weight
    assert report["transformer.h.1.mlp.c_fc.weight", "c_fc"].shape == (4 * WIDTH, WIDTH)
    assert up.shape == (WIDTH, 4 * WIDTH)
    assert up.std().item() == pytest.approx(WIDTH**-0.5, rel=0.05)  # of WIDTH inputs
    assert model.transformer.h[1].mlp.c_proj.weight.std().item() == pytest.approx((4 * WIDTH) ** -0.5, rel=0.05)
    packed = model.transformer.h[2].attn.c_attn.weight
    assert report["transformer.h.2.attn.c_attn.weight", "c_attn_1"].shape == (WIDTH, WIDTH)
    for part in packed.split(WIDTH, dim=1):
        assert part.std().item() == pytest.approx(WIDTH**-0.5, rel=0.05)
    assert model.lm_head_multiplier == pytest.approx(BASE / WIDTH)


def test_interleaved_rows(generated) -> None:
    """Under SGD the decay's projection of Qwen3-Next has a rule of its own; its rows alternate with those of β."""
    module, model = generated("qwen3_next")
    report = {(each.name, each.role): each for each in module.init_(model, width=WIDTH, base_width=BASE)}
    name = "model.layers.4.linear_attn.in_proj_ba.weight"
    assert report[name, "in_proj_ba_0"].shape == report[name, "in_proj_ba_1"].shape == (WIDTH // 16, WIDTH)
    experts = "model.layers.3.mlp.experts.gate_up_proj"
    assert report[experts, "gate_up_proj_2_1"].shape == (8, 2 * WIDTH, WIDTH)
    gates = [groups["lr"] for groups in module.param_groups(model, lr=1.0, width=WIDTH, base_width=BASE)]
    assert min(gates) == pytest.approx(BASE / WIDTH)


def test_fan_in_of_a_convolution(generated) -> None:
    module, model = generated("cnn")
    module.init_(model, width=WIDTH, base_width=BASE)
    assert model[2].weight.std().item() == pytest.approx((9 * WIDTH) ** -0.5, rel=0.05)
    assert model[0].weight.std().item() == pytest.approx(27**-0.5, rel=0.05)


def test_trains(generated) -> None:
    module, model = generated("qwen3_next")
    module.init_(model, width=WIDTH, base_width=BASE)
    optimizer = torch.optim.AdamW(module.param_groups(model, lr=5e-3, width=WIDTH, base_width=BASE))
    batch = torch.arange(48).reshape(2, 24) % 11
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3
