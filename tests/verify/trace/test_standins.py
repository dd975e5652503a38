"""Functions that are not traced into: those of users, and FLA's kernels."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from traced_models import around

from widthwise.derive import architecture, derive
from widthwise.derive.errors import DeriveError
from widthwise.verify.trace import rotate, stand_in, trace
from widthwise.verify.trace.standins import STAND_INS


def kernel(x: Tensor, y: Tensor) -> Tensor:
    """What cannot be traced: it looks at values."""
    return x * y if bool((x > 0).all()) else y


class TestStandIns:
    def test_five_lines(self, monkeypatch: pytest.MonkeyPatch) -> None:
        make = around(lambda m, x: kernel(m.hidden(x), x))
        with pytest.raises(DeriveError, match="refuses the model at width 128"):
            trace(make)
        monkeypatch.setattr("widthwise.verify.trace.standins.STAND_INS", dict(STAND_INS))

        @stand_in(f"{__name__}:kernel")
        def gate(x: Tensor, y: Tensor) -> Tensor:
            return torch.sigmoid(x) * y

        before = kernel
        assert derive(trace(make).graph).rule("hidden").lr == -1
        assert kernel is before


def turned(x: Tensor) -> Tensor:
    """A rotary embedding as people write it."""
    a, b = x.chunk(2, -1)
    angle = torch.arange(x.shape[-2])[:, None] / 10.0 ** torch.arange(a.shape[-1])
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


class Attention(nn.Module):
    """Attention of one's own, written out."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(96, n), nn.LayerNorm(n), nn.Linear(n, 96, bias=False)
        self.q, self.k, self.v, self.o = (nn.Linear(n, n, bias=False) for _ in range(4))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        h = self.norm(x)
        q, k, v = (each(h).unflatten(-1, (-1, 16)).transpose(1, 2) for each in (self.q, self.k, self.v))
        scores = turned(q) @ turned(k).transpose(-1, -2) / 4.0
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(later, float("-inf")).softmax(-1)
        return self.head(x + self.o((weights @ v).transpose(1, 2).flatten(-2)))


def attention(n: int) -> tuple[nn.Module, tuple[Tensor]]:
    return Attention(n), (torch.zeros(2, 6, dtype=torch.long),)


def test_a_rotary_embedding_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeriveError, match=r"a rotary embedding, one that returns widthwise.verify.trace.rotate"):
        trace(attention)
    monkeypatch.setattr("widthwise.verify.trace.standins.STAND_INS", dict(STAND_INS))

    @stand_in(f"{__name__}:turned")
    def rotary(x: Tensor) -> Tensor:
        return rotate(x)

    table, described = derive(trace(attention).graph), derive(architecture("transformer", scaling="head-dim-fixed"))
    for name in "qkvo":
        assert table.rule(name).lr == described.rule(f"{name}_proj").lr == -1
        assert table.rule(name).init_std == described.rule(f"{name}_proj").init_std


class Scanned(nn.Module):
    """Gated DeltaNet's core by a function of FLA's, whose kernels only a GPU runs."""

    def __init__(self, n: int, function, **more: Any) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(96, n), nn.RMSNorm(n), nn.Linear(n, 96, bias=False)
        self.qkv, self.gates = nn.Linear(n, 3 * n, bias=False), nn.Linear(n, n // 8, bias=False)
        self.o_norm, self.out = nn.RMSNorm(16), nn.Linear(n, n, bias=False)
        self.function, self.more = function, more

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        h = self.norm(x)
        q, k, v = (each.unflatten(-1, (-1, 16)) for each in self.qkv(h).chunk(3, -1))
        beta, g = self.gates(h).chunk(2, -1)
        more = {"use_qk_l2norm_in_kernel": True, "output_final_state": False} | self.more
        o, _ = self.function(q, k, v, g=-nn.functional.softplus(g), beta=beta.sigmoid(), **more)
        return self.head(x + self.out(self.o_norm(o).flatten(-2)))


@pytest.fixture(params=["chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"])
def fla(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """A module of FLA's with a function that cannot be traced, and how to call it by name."""
    module = ModuleType("fla.ops.gated_delta_rule")

    def hidden(*given: Any, **more: Any) -> Any:
        raise RuntimeError("a kernel")

    setattr(module, request.param, hidden)
    monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule", module)
    return lambda *given, **more: getattr(module, request.param)(*given, **more)


class TestFLA:
    def test_its_scans_are_leaves(self, fla) -> None:
        graph = trace(lambda n: (Scanned(n, fla), (torch.zeros(2, 6, dtype=torch.long),))).graph
        (scan,) = (node for node in graph.nodes if node.op == "scan")
        assert scan.attrs["decay"]
        assert scan.attrs["strength"]
        assert scan.attrs["power"] == 0  # head dims stay, and so does their -1/2
        table = derive(graph)
        assert table.rule("qkv_0").lr == -1

    def test_what_changes_their_meaning_is_refused(self, fla) -> None:
        with pytest.raises(DeriveError, match="a scan with head_first"):
            trace(lambda n: (Scanned(n, fla, head_first=True), (torch.zeros(2, 6, dtype=torch.long),)))
