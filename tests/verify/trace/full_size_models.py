"""Published sizes: what makes each class at a width, on whatever device is current."""

from __future__ import annotations

import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
import traced_models
from checked_models import imported
from traced_models import MLP, Made

from widthwise.codegen.render import render
from widthwise.codegen.request import Request

TOKENS = (torch.zeros(2, 8, dtype=torch.long, device="cpu"),)
WIDTHS = {
    "llama": 4096,
    "qwen3": 4096,
    "mamba2": 4096,
    "qwen3_next": 2048,
    "gated_deltanet": 2048,
    "mlp": 8192,
    "cnn": 1024,
}
sys.modules.setdefault("fla", None)  # type: ignore[arg-type]  # transformers would import FLA, which needs a GPU


def llama(n: int) -> Made:
    """Llama 2 7B at 4096."""
    import transformers

    sizes = {"intermediate_size": n * 11008 // 4096, "num_attention_heads": n // 128, "num_key_value_heads": n // 128}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(hidden_size=n, use_cache=False, **sizes)), TOKENS


def qwen3(n: int) -> Made:
    """Qwen3 8B at 4096."""
    import transformers

    sizes = {"num_attention_heads": n // 128, "num_key_value_heads": n // 512, "head_dim": 128}
    config = transformers.Qwen3Config(
        hidden_size=n, intermediate_size=3 * n, num_hidden_layers=36, use_cache=False, **sizes
    )
    return transformers.Qwen3ForCausalLM(config), TOKENS


def mamba2(n: int) -> Made:
    """The configuration's own sizes (Mamba-Codestral 7B) at 4096."""
    import transformers

    config = transformers.Mamba2Config(hidden_size=n, num_heads=n // 32, use_cache=False)
    return transformers.Mamba2ForCausalLM(config), TOKENS


def qwen3_next(n: int) -> Made:
    """Qwen3-Next 80B-A3B at 2048."""
    import transformers

    sizes = {"num_attention_heads": n // 128, "num_key_value_heads": n // 1024, "linear_num_key_heads": n // 128}
    sizes |= {"linear_num_value_heads": n // 64, "moe_intermediate_size": n // 4}
    config = transformers.Qwen3NextConfig(
        hidden_size=n, shared_expert_intermediate_size=n // 4, use_cache=False, **sizes
    )
    return transformers.Qwen3NextForCausalLM(config), TOKENS


@cache
def _emitted() -> type[Any]:
    module = imported(render(Request("gated_deltanet"), "model"), Path(tempfile.mkdtemp()), "full_size_emitted")
    cls: type[Any] = module.GatedDeltaNetLM
    return cls


def gated_deltanet(n: int) -> Made:
    """Our generated model, heads fixed: 24 layers, 1.6 billion parameters at 2048."""
    sizes = {"width": 2048, "depth": 24, "vocab": 32000, "H": 8, "d_k": 256, "d_v": 512, "ffn": 5632}
    return _emitted()(**_emitted().widened(n, **sizes)), TOKENS


def mlp(n: int) -> Made:
    return MLP(n, 32), (torch.zeros(3, 6),)


def cnn(n: int) -> Made:
    return traced_models.cnn(n)
