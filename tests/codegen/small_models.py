"""Models as users write them, with the names that the descriptions have."""

import torch
from torch import Tensor, nn


class Hidden(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(n, n)

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden(x).relu()


class MLP(nn.Module):
    """features → n → … → n → classes."""

    def __init__(self, n: int, depth: int = 2, features: int = 6, classes: int = 5) -> None:
        super().__init__()
        self.input = nn.Linear(features, n)
        self.layers = nn.ModuleList(Hidden(n) for _ in range(depth))
        self.output = nn.Linear(n, classes, bias=False)
        self.output_multiplier = 1.0

    def forward(self, x: Tensor) -> Tensor:
        x = self.input(x).relu()
        for layer in self.layers:
            x = layer(x)
        return self.output(x) * self.output_multiplier


class Attention(nn.Module):
    """Causal softmax attention of H heads; the scores are multiplied by a number that scales."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.attn_scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for proj in self.projections)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.attn_scale)
        return self.o_proj(y.transpose(1, 2).flatten(-2))

    @property
    def projections(self) -> tuple[nn.Linear, ...]:
        return self.q_proj, self.k_proj, self.v_proj


class GatedMLP(nn.Module):
    def __init__(self, width: int, ffn: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(width, ffn, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(ffn, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn_norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attn, self.mlp = Attention(width, heads), GatedMLP(width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.attn_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """The description of ``transformer``, heads-fixed."""

    def __init__(self, width: int, heads: int = 2, vocab: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embeddings = nn.Embedding(vocab, width)
        self.model.layers = nn.ModuleList(Layer(width, heads) for _ in range(depth))
        self.model.norm = nn.RMSNorm(width)
        self.lm_head = nn.Linear(width, vocab, bias=False)
        self.lm_head_multiplier = 1.0

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.model.embeddings(tokens)
        for layer in self.model.layers:
            x = layer(x)
        return self.lm_head(self.model.norm(x)) * self.lm_head_multiplier


def learnable_text(batches: int, vocab: int = 64, size: int = 4, length: int = 48) -> list[Tensor]:
    """Tokens [size, length]: each follows from the one before by a fixed permutation, nine times in ten."""
    generator = torch.Generator().manual_seed(0)
    after = torch.randperm(vocab, generator=generator)
    texts = []
    for _ in range(batches):
        x = torch.randint(0, vocab, (size, length), generator=generator)
        keep = torch.rand(size, length, generator=generator) < 0.9
        for t in range(1, length):
            x[:, t] = torch.where(keep[:, t], after[x[:, t - 1]], x[:, t])
        texts.append(x)
    return texts
