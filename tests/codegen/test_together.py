"""The emitted model under the emitted parametrization."""

import itertools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402
from small_models import learnable_text  # noqa: E402

Generated = Callable[..., ModuleType]
BASE = 16
SCALINGS = ("heads-fixed", "head-dim-fixed")


def sizes(width: int, scaling: str) -> dict[str, int]:
    """Two heads of 8 at the base width."""
    ratio = width // BASE
    heads, head_dim = (2, 8 * ratio) if scaling == "heads-fixed" else (2 * ratio, 8)
    return {"width": width, "depth": 2, "vocab": 64, "H": heads, "d_k": head_dim, "d_v": head_dim, "ffn": 2 * width}


def trained(model: Any, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for tokens in learnable_text(steps, size=2, length=33):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


OPTIMIZERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, betas=(0.9, 0.95)),
    "sgd": lambda groups: torch.optim.SGD(groups, momentum=0.9, nesterov=True),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_nothing_changes_at_the_base_width(generated: Generated, scaling: str, optimizer: str, tied: bool) -> None:
    request = {"scaling": scaling, "tied": tied}
    rules, models = (
        generated("gated_deltanet", optimizer=optimizer, **request),
        generated("gated_deltanet", emit="model", **request),
    )
    plain, ours = (models.GatedDeltaNetLM(**sizes(BASE, scaling), seed=seed).double() for seed in (7, 8))
    plain.reset_parameters(seed=7)  # again, in the float64 that it has now
    rules.init_(ours, width=BASE, base_width=BASE, seed=7)
    for (name, one), (_, other) in zip(plain.named_parameters(), ours.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    knobs = {"lr": 1e-2, "weight_decay": 0.1} | ({"eps": 1e-9} if optimizer == "adamw" else {})
    groups = rules.param_groups(ours, width=BASE, base_width=BASE, **knobs)
    alone = [{"params": list(plain.parameters()), **knobs}]
    assert trained(plain, OPTIMIZERS[optimizer](alone), 4) == trained(ours, OPTIMIZERS[optimizer](groups), 4)
    for (name, one), (_, other) in zip(plain.named_parameters(), ours.named_parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize(("optimizer", "scaling"), itertools.product(OPTIMIZERS, SCALINGS))
def test_both_gauges_follow_the_same_trajectory(generated: Generated, scaling: str, optimizer: str) -> None:
    width, losses = 48, {}
    for gauge in ("multiplier", "absorbed"):
        rules = generated("gated_deltanet", optimizer=optimizer, scaling=scaling, gauge=gauge)
        models = generated("gated_deltanet", emit="model", scaling=scaling)
        model = models.GatedDeltaNetLM(**sizes(width, scaling)).double()
        rules.init_(model, width=width, base_width=BASE, norm_eps=1e-5)
        assert (model.lm_head_multiplier == 1) == (gauge == "absorbed")
        groups = rules.param_groups(model, lr=1e-2, weight_decay=0.1, eps=1e-6, width=width, base_width=BASE)
        losses[gauge] = trained(model, OPTIMIZERS[optimizer](groups), 12)
    assert losses["multiplier"] == pytest.approx(losses["absorbed"], rel=1e-9)
    assert losses["multiplier"][-1] < losses["multiplier"][0]


def test_a_loaded_model_needs_its_multipliers(generated: Generated) -> None:
    rules, models = generated("gated_deltanet"), generated("gated_deltanet", emit="model")
    widths = {"width": 48, "base_width": BASE}
    model = models.GatedDeltaNetLM(**sizes(48, "heads-fixed"))
    rules.init_(model, **widths)
    loaded = models.GatedDeltaNetLM(**sizes(48, "heads-fixed"))
    loaded.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match=r"lm_head_multiplier is 1, not 0\.333333: call init_ or set_multipliers"):
        rules.param_groups(loaded, lr=1.0, **widths)
    made = models.GatedDeltaNetLM(**sizes(48, "heads-fixed"), multipliers=rules.multipliers(**widths))
    made.load_state_dict(model.state_dict())
    rules.param_groups(made, lr=1.0, **widths)
    tokens = learnable_text(1)[0]
    assert torch.equal(made(tokens), model(tokens))
    assert not torch.equal(loaded(tokens), model(tokens))


def test_a_low_temperature_takes_the_likeliest_token(generated: Generated) -> None:
    model = generated("gated_deltanet", emit="model").GatedDeltaNetLM(**sizes(BASE, "heads-fixed"))
    prompt = learnable_text(1)[0][:, :5]
    cold = model.generate(prompt, 12, temperature=1e-4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(cold, model.generate(prompt, 12, temperature=0))
    warm = model.generate(prompt, 12, temperature=1.0, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(cold, warm)
