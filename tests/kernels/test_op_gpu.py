"""What surrounds the op, on a GPU: compilation, export, checkpointing, autocast, and what its checks refuse."""

import pytest
import torch
import torch._inductor.config
from torch.utils.checkpoint import checkpoint

from widthwise.kernels import checks, gated_delta_rule, gated_delta_rule_step

pytestmark = pytest.mark.gpu
OP = torch.ops.widthwise.gated_delta_rule.default


def draw(dtype=torch.bfloat16, time=70, **changes):
    torch.manual_seed(0)
    tokens = {
        "q": torch.randn(2, time, 2, 32, device="cuda", dtype=dtype),
        "k": torch.randn(2, time, 2, 32, device="cuda", dtype=dtype),
        "v": torch.randn(2, time, 4, 48, device="cuda", dtype=dtype),
        "g": -torch.rand(2, time, 4, device="cuda"),
        "beta": torch.rand(2, time, 4, device="cuda"),
    }
    return tokens | changes


def solve(function, **options):
    leaves = {name: x.requires_grad_() for name, x in draw(**options).items()}
    o = function(leaves)
    return o, *torch.autograd.grad(o.float().square().sum(), list(leaves.values()))


def scan(tokens):
    return gated_delta_rule(**tokens, normalize_qk=True)[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_compiles_in_one_graph(dtype):
    with torch._inductor.config.patch(force_disable_caches=True):
        compiled = solve(torch.compile(scan, fullgraph=True), dtype=dtype)
    assert all(torch.equal(a, b) for a, b in zip(compiled, solve(scan, dtype=dtype), strict=True))


def test_a_step_compiles_in_one_graph():
    tokens = {name: x[:, 0] for name, x in draw().items()}
    state = torch.randn(2, 4, 32, 48, device="cuda")
    with torch._inductor.config.patch(force_disable_caches=True):
        compiled = torch.compile(gated_delta_rule_step, fullgraph=True)(**tokens, state=state)
    assert all(torch.equal(a, b) for a, b in zip(compiled, gated_delta_rule_step(**tokens, state=state), strict=True))


def test_exports_as_one_node():
    class Scan(torch.nn.Module):
        def forward(self, q, k, v, g, beta):
            return gated_delta_rule(q, k, v, g, beta, normalize_qk=True)[0]

    time = torch.export.Dim("time", min=2, max=4096)
    program = torch.export.export(Scan(), (), draw(), dynamic_shapes={name: {1: time} for name in draw()})
    assert [node.target for node in program.graph.nodes].count(OP) == 1
    for length in (70, 129):
        tokens = draw(time=length)
        assert torch.equal(program.module()(**tokens), scan(tokens))


def test_checkpointing_changes_nothing():
    def saved(tokens):
        return checkpoint(lambda *x: scan(dict(zip(tokens, x, strict=True))), *tokens.values(), use_reentrant=False)

    assert all(torch.equal(a, b) for a, b in zip(solve(saved), solve(scan), strict=True))


def test_autocast_casts_q_k_v():
    with torch.autocast("cuda", torch.bfloat16):
        o = scan(draw(torch.float32))
    assert o.dtype == torch.bfloat16
    assert torch.equal(o, scan(draw(torch.float32) | {n: draw(torch.float32)[n].bfloat16() for n in ("q", "k", "v")}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.ones(2, 70, 2, 32, dtype=torch.bfloat16)}, r"k.device is cuda:0; accepted: q's device, cpu"),
        ({"beta": torch.ones(2, 70, 4)}, r"beta.device is cpu; accepted: q's device, cuda"),
        ({"g": torch.ones(2, 70, 4).cuda}, r"max\(g\) is 1.0; accepted: g <= 0"),
        ({n: torch.ones(2, 70, 2, 257).cuda for n in "qk"} | {"v": torch.ones(2, 70, 4, 48).cuda}, "K <= 256"),
        (
            {n: torch.ones(2, 70, 2, 32).double().cuda for n in "qk"} | {"v": torch.ones(2, 70, 4, 48).double().cuda},
            "float32",
        ),
        ({"v": torch.ones(2, 70, 4, 513).bfloat16().cuda}, "V <= 512"),
    ],
)
def test_wrong_arguments(changes, message, monkeypatch):
    monkeypatch.setattr(checks.check_values, "gates_seen", False)  # as in the first call of a process
    changes = {name: x() if callable(x) else x for name, x in changes.items()}
    with pytest.raises(ValueError, match=message):
        scan(draw(**changes))


def test_wrong_gates_in_a_later_call(monkeypatch):
    monkeypatch.setattr(checks.check_values, "gates_seen", True)
    monkeypatch.setenv("WIDTHWISE_CHECK", "1")
    with pytest.raises(ValueError, match=r"max\(g\)"):
        scan(draw(g=torch.ones(2, 70, 4, device="cuda")))


def test_cu_seqlens_that_do_not_fit():
    tokens = {name: x[:1] for name, x in draw().items()}
    with pytest.raises(ValueError, match=r"cu_seqlens\[-1\] is 69; accepted: the number of tokens, 70"):
        gated_delta_rule(**tokens, cu_seqlens=torch.tensor([0, 69], device="cuda"))
