"""Models that we did not write, through a name map of a few lines: transformers' Qwen3-Next, FLA's Gated DeltaNet."""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from small_models import MLP, learnable_text  # noqa: E402

Generated = Callable[..., ModuleType]
HEADS, GROUP, BASE, VOCABULARY = 2, 2, 32, 64
DOCUMENTATION = Path(__file__).parents[2] / "docs" / "models.md"
OPTIONS = {"gauge": "absorbed", "options": ("qk_scale=d_k^-1/2", "value_groups=on")}


def qwen3_next(width: int, head_dim: int, heads: int) -> Any:
    """Gated DeltaNet layers and dense MLPs alone: the roles that the description has."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3NextConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        layer_types=["linear_attention"] * 2,
        mlp_only_layers=[0, 1],
        linear_num_key_heads=heads,
        linear_num_value_heads=GROUP * heads,
        linear_key_head_dim=head_dim,
        linear_value_head_dim=head_dim,
        pad_token_id=0,
        use_cache=False,
    )
    return transformers.Qwen3NextForCausalLM(config)


def scaling_of(module: ModuleType, config: Any) -> Any:
    """The rules under Qwen3-Next's names, by the function that the documentation shows."""
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENTATION.read_text(encoding="utf-8"), re.S)
    shown: dict[str, Any] = {}
    exec(compile(code, str(DOCUMENTATION), "exec"), shown)
    return shown["qwen3_next_scaling"](module, config)


@pytest.fixture
def _without_fla(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would take FLA's Triton kernels where FLA is installed, and those need a GPU."""
    monkeypatch.setitem(sys.modules, "fla", None)


@pytest.mark.usefixtures("_without_fla")
class TestQwen3Next:
    @pytest.mark.parametrize("scaling", ["heads-fixed", "head-dim-fixed"])
    def test_is_initialized_and_grouped_row_by_row(self, generated: Generated, scaling: str) -> None:
        module = generated("gated_deltanet", scaling=scaling, **OPTIONS)
        heads, head_dim = (2, 32) if scaling == "heads-fixed" else (8, 8)
        model = qwen3_next(128, head_dim, heads)
        rules = scaling_of(module, model.config)
        widths: dict[str, Any] = {"width": 128, "base_width": 32, "scaling": rules}
        report = module.init_(model, norm_eps=1e-6, **widths)
        assert {each.name for each in report} == {name for name, _ in model.named_parameters()}
        mixer = model.model.layers[1].linear_attn
        # base std 32^(-1/2) times 4^(-1/2); gates with few heads start 2 times lower: 4^-1
        gate = 128**-0.5 / (2 if scaling == "heads-fixed" else 1)
        assert mixer.in_proj_qkvz.weight.std().item() == pytest.approx(128**-0.5, rel=0.05)
        assert mixer.in_proj_ba.weight.std().item() == pytest.approx(gate, rel=0.1)
        assert mixer.conv1d.weight.abs().max().item() == pytest.approx(0.5, rel=0.05)
        assert 0 <= mixer.A_log.min() <= mixer.A_log.max() <= torch.log(torch.tensor(16.0))
        assert model.lm_head.weight.std().item() == pytest.approx(32**-0.5 / 4, rel=0.05)
        assert not model.model.norm.weight.any()
        # the output norm's eps takes the multiplier: o is n^-1 where d_k^(-1/2) and q·k both fall as n^-1/2
        expected = 1e-6 / 16 if scaling == "heads-fixed" else 1e-6
        assert mixer.norm.variance_epsilon == pytest.approx(expected)
        groups = {each["name"]: each for each in module.param_groups(model, lr=0.4, weight_decay=0.1, **widths)}
        assert groups["q_proj+k_proj+v_proj+g_proj"]["lr"] == 0.1
        assert groups["q_proj+k_proj+v_proj+g_proj"]["weight_decay"] == pytest.approx(0.4)
        assert groups["embeddings"]["lr"] == 0.4
        held = [parameter for group in groups.values() for parameter in group["params"]]
        assert len(held) == len(list(model.parameters()))

    @pytest.mark.parametrize("width", [32, 64])
    def test_trains_at_two_widths(self, generated: Generated, width: int) -> None:
        module = generated("gated_deltanet", **OPTIONS)
        model = qwen3_next(width, width // 4, HEADS)
        widths: dict[str, Any] = {"width": width, "base_width": BASE}
        widths["scaling"] = scaling_of(module, model.config)
        module.init_(model, norm_eps=1e-6, **widths)
        optimizer = torch.optim.AdamW(module.param_groups(model, lr=1e-2, **widths))
        losses = []
        for batch in learnable_text(200):
            optimizer.zero_grad()
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] > 4  # log 64 = 4.16, and logits of Θ(1)
        assert sum(losses[-10:]) / 10 < 1  # the entropy of the text is 0.74

    def test_a_tied_one_needs_tied_rules(self, generated: Generated) -> None:
        module = generated("gated_deltanet", **OPTIONS)
        model = qwen3_next(64, 16, HEADS)
        model.lm_head.weight = model.model.embed_tokens.weight
        with pytest.raises(ValueError, match=r"has 2 rules \(embeddings, lm_head\); where two are tied, .*--tied"):
            module.param_groups(model, lr=1.0, width=64, base_width=32, scaling=scaling_of(module, model.config))

    def test_trains_under_the_hugging_face_trainer(self, generated: Generated, tmp_path) -> None:
        transformers = pytest.importorskip("transformers")
        pytest.importorskip("accelerate")
        module, model = generated("gated_deltanet", **OPTIONS), qwen3_next(64, 16, HEADS)
        widths: dict[str, Any] = {"width": 64, "base_width": 32, "scaling": scaling_of(module, model.config)}
        module.init_(model, norm_eps=1e-6, **widths)
        optimizer = torch.optim.AdamW(module.param_groups(model, lr=1e-2, **widths))
        arguments = transformers.TrainingArguments(
            str(tmp_path),
            max_steps=4,
            per_device_train_batch_size=4,
            lr_scheduler_type="linear",
            report_to="none",
            use_cpu=True,
            save_steps=2,
            disable_tqdm=True,
        )
        rows = [{"input_ids": row, "labels": row} for batch in learnable_text(4) for row in batch]
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, scheduler))
        trainer.train()
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        assert rates["o_proj"] == pytest.approx(1e-2 * 0.5 / 5)
        assert rates["embeddings"] == pytest.approx(1e-2 / 5)
        assert os.path.exists(tmp_path / "checkpoint-2")


class TestFLA:
    def test_names_are_the_descriptions(self, generated: Generated) -> None:
        """In a process of its own, since importing FLA changes what transformers does."""
        if importlib.util.find_spec("fla") is None or importlib.util.find_spec("einops") is None:
            pytest.skip("FLA (flash-linear-attention, fla-core, einops) is not installed")
        module = generated("gated_deltanet", gauge="absorbed", options=("qk_scale=d_k^-1/2",))
        code = """
import sys, torch
sys.path.insert(0, sys.argv[1])
rules = __import__(sys.argv[2])
from fla.models import GatedDeltaNetConfig, GatedDeltaNetForCausalLM
sizes = dict(hidden_size=64, num_heads=2, head_dim=16, num_hidden_layers=2, vocab_size=64, expand_v=2)
model = GatedDeltaNetForCausalLM(GatedDeltaNetConfig(**sizes))
report = rules.init_(model, width=64, base_width=32, norm_eps=1e-5)
assert {each.name for each in report} == {name for name, _ in model.named_parameters()}
assert model.model.layers[1].attn.o_norm.eps == 1e-5 / 4
groups = rules.param_groups(model, lr=1.0, width=64, base_width=32)
assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
"""
        file = Path(module.__file__)
        subprocess.run([sys.executable, "-c", code, str(file.parent), file.stem], check=True)


class TestLightning:
    def test_trains(self, generated: Generated, tmp_path) -> None:
        lightning = pytest.importorskip("lightning")
        module = generated("mlp")

        class Lit(lightning.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.model = MLP(64)
                module.init_(self.model, width=64, base_width=16)

            def training_step(self, batch, index):
                return torch.nn.functional.cross_entropy(self.model(batch[0]), batch[1])

            def configure_optimizers(self):
                optimizer = torch.optim.AdamW(module.param_groups(self.model, lr=1e-2, width=64, base_width=16))
                return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

        data = torch.utils.data.TensorDataset(torch.randn(32, 6), torch.randint(0, 5, (32,)))
        trainer = lightning.Trainer(
            max_epochs=2,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        lit = Lit()
        trainer.fit(lit, torch.utils.data.DataLoader(data, batch_size=8))
        rates = {group["name"]: group["lr"] for group in trainer.optimizers[0].param_groups}
        assert rates["hidden"] == pytest.approx(1e-2 / 4 / 4)
        assert rates["output"] == pytest.approx(1e-2 / 4)
