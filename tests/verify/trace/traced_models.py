"""Models as users write them, and the functions that make them at a width."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

WIDTHS = (128, 160, 224)
ELSEWHERE = 192  # a width that is not traced
Made = tuple[nn.Module, tuple[Any, ...]]


class Hidden(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(n, n)

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden(x).relu()


class MLP(nn.Module):
    def __init__(self, n: int, depth: int = 3) -> None:
        super().__init__()
        self.input = nn.Linear(6, n)
        self.layers = nn.ModuleList(Hidden(n) for _ in range(depth))
        self.output = nn.Linear(n, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.input(x).relu()
        for layer in self.layers:
            x = layer(x)
        return self.output(x)


def mlp(n: int) -> Made:
    return MLP(n), (torch.zeros(3, 6),)


def cnn(n: int) -> Made:
    """Two convolutions of n and 2n channels, a hidden layer of 4n units over all places, a readout."""
    layers = [
        nn.Conv2d(3, n, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(n, 2 * n, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * n * 16, 4 * n),
        nn.ReLU(),
        nn.Linear(4 * n, 10, bias=False),
    ]
    return nn.Sequential(*layers), (torch.zeros(2, 3, 16, 16),)


class Residual(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        layers = [nn.BatchNorm2d(n), nn.ReLU(), nn.Conv2d(n, n, 3, padding=1, bias=False)]
        self.branch = nn.Sequential(*layers, nn.BatchNorm2d(n), nn.ReLU(), nn.Conv2d(n, n, 3, padding=1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def resnet(n: int) -> Made:
    """Residual convolutions behind batch norms, averaged over places."""
    layers = [nn.Conv2d(3, n, 3, padding=1, bias=False), *(Residual(n) for _ in range(3)), nn.BatchNorm2d(n), nn.ReLU()]
    readout = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n, 10, bias=False)]
    return nn.Sequential(*layers, *readout), (torch.zeros(2, 3, 8, 8),)


def tokens(length: int = 6) -> tuple[Tensor]:
    return (torch.zeros(2, length, dtype=torch.long),)


def llama(n: int, heads: int = 0, **more: Any) -> Made:
    """Head dim 16, or a fixed number of ``heads``."""
    import transformers

    count = heads or n // 16
    sizes = {
        "vocab_size": 96,
        "hidden_size": n,
        "intermediate_size": 3 * n,
        "num_hidden_layers": 3,
        "num_attention_heads": count,
        "num_key_value_heads": count if heads else n // 32,
        "use_cache": False,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | more)), tokens()


def qwen3(n: int) -> Made:
    import transformers

    config = transformers.Qwen3Config(
        vocab_size=96,
        hidden_size=n,
        intermediate_size=3 * n,
        num_hidden_layers=3,
        num_attention_heads=n // 16,
        num_key_value_heads=n // 32,
        head_dim=16,
        use_cache=False,
    )
    return transformers.Qwen3ForCausalLM(config), tokens()


def gpt2(n: int) -> Made:
    """Weights stored as [in, out], biases, a tied readout. Its final norm has a bias, so that no one weight can absorb
    the readout's multiplier: the model gets a place for it."""
    import transformers

    sizes = {"vocab_size": 96, "n_embd": n, "n_layer": 3, "n_head": n // 16, "n_positions": 64}
    sizes |= dict.fromkeys(("bos_token_id", "eos_token_id"), 0)
    config = transformers.GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, **sizes)
    model = transformers.GPT2LMHeadModel(config)
    model.lm_head_multiplier = 1.0
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * model.lm_head_multiplier)
    return model, tokens()


def mamba2(n: int) -> Made:
    import transformers

    config = transformers.Mamba2Config(
        vocab_size=96,
        hidden_size=n,
        num_hidden_layers=3,
        num_heads=n // 16,
        head_dim=32,
        state_size=16,
        n_groups=1,
        use_cache=False,
    )
    return transformers.Mamba2ForCausalLM(config), tokens(8)


def qwen3_next(n: int, layers: int = 8, experts: str = "eager") -> Made:
    """Three layers of gated delta to one of gated attention, experts in each, computed as ``experts`` says."""
    import transformers

    config = transformers.Qwen3NextConfig(
        vocab_size=96,
        hidden_size=n,
        num_hidden_layers=layers,
        num_attention_heads=n // 16,
        num_key_value_heads=n // 32,
        head_dim=32,
        linear_num_key_heads=n // 32,
        linear_num_value_heads=n // 16,
        linear_key_head_dim=16,
        linear_value_head_dim=24,
        moe_intermediate_size=2 * n,
        shared_expert_intermediate_size=n,
        num_experts=8,
        num_experts_per_tok=2,
        experts_implementation=experts,
        use_cache=False,
    )
    return transformers.Qwen3NextForCausalLM(config), tokens()


class Around(nn.Module):
    """A hidden layer with something done around it."""

    def __init__(self, n: int, done, **more: nn.Module) -> None:
        super().__init__()
        self.input, self.hidden, self.output = nn.Linear(6, n), nn.Linear(n, n), nn.Linear(n, 5)
        for name, module in more.items():
            setattr(self, name, module)
        self.done = done

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.done(self, self.input(x)))


def around(done, **more):
    return lambda n: (Around(n, done, **{name: make(n) for name, make in more.items()}), (torch.zeros(3, 6),))
