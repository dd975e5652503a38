"""What is measured where: gradients that cancel, and steps that know a part of their tokens."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from widthwise.derive import Builder, Graph, derive
from widthwise.derive.laws import UNIT_NORMAL
from widthwise.verify.coord.check import coordinate_check
from widthwise.verify.coord.factory import Factory
from widthwise.verify.coord.predict import predictions
from widthwise.verify.coord.run import _uncancelled

WIDTHS, BASE, EXPERTS = (64, 256, 1024), 64, 8


def test_a_gradient_that_cancels_is_zero() -> None:
    gradient = torch.tensor([[1e-3, -2e-9, 1e-6], [1e-9, 2e-9, 0.0]])
    assert _uncancelled(gradient).tolist() == (gradient * torch.tensor([[1, 0, 1], [1, 1, 0]])).tolist()


class Routed(nn.Module):
    """Each token is scaled by two of eight experts, by the router's shares of them."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.table = nn.Embedding(64, n)
        self.router = nn.Linear(n, EXPERTS, bias=False)
        self.experts = nn.Parameter(torch.randn(EXPERTS))
        self.head = nn.Linear(n, 64, bias=False)
        nn.init.normal_(self.table.weight)
        nn.init.normal_(self.router.weight, std=BASE**0.5 / n)
        nn.init.normal_(self.head.weight, std=BASE**0.5 / n)

    def forward(self, tokens: Tensor) -> Tensor:
        h = F.rms_norm(self.table(tokens), (self.table.embedding_dim,))
        share, chosen = self.router(h).softmax(-1).topk(2)
        share = share / share.sum(-1, keepdim=True)
        return self.head(h * (share * self.experts[chosen]).sum(-1, keepdim=True))


def described() -> Graph:
    g = Builder("routed")
    n, experts, vocab = g.dim("n", 1), g.dim("experts"), g.dim("vocab")
    h = g.norm(g.embedding("table", vocab, n), output="h")
    share = g.op("softmax", g.linear(h, "router", experts, output="z"))
    value = g.product(share, g.parameter("experts", experts, law=UNIT_NORMAL))
    g.cross_entropy(g.linear(g.product(h, value, n), "head", vocab, output="logits"))
    return g.build()


def test_a_routers_step_is_seen_at_the_tokens_that_made_it() -> None:
    graph = described()
    table = derive(graph)
    factory = Factory("own", Routed, graph, table, BASE)
    report = coordinate_check(factory, predictions(graph, table), WIDTHS, seeds=range(4))
    found = {(each.kind, each.name, each.step): each for each in report.results}
    assert found["own step", "router in z", 1].slope.value == pytest.approx(0.0, abs=0.15)
    # and its gradient where there is one, not at the rounding of the experts that were not chosen
    assert min(found["gradient", "z", 0].sizes) > 1e-6
