"""What surrounds the op: autograd once, compilation, export, checkpointing, autocast, DDP, FLA's names, imports."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._inductor.config
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from widthwise.kernels import gated_delta_rule, gated_delta_rule_reference, op
from widthwise.kernels.fla import chunk_gated_delta_rule

OP = torch.ops.widthwise.gated_delta_rule.default


class Layer(torch.nn.Module):
    """The smallest layer that has the scan in it: H=2, HV=4, K=4, V=6 over a width of 8."""

    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Linear(8, 2 * 8 + 24 + 8)
        self.readout = torch.nn.Linear(24, 8)

    def forward(self, x):
        q, k, v, g, beta = self.project(x).split([8, 8, 24, 4, 4], dim=-1)
        q, k, v = q.unflatten(-1, (2, 4)), k.unflatten(-1, (2, 4)), v.unflatten(-1, (4, 6))
        g, beta = -torch.nn.functional.softplus(g.float()), beta.sigmoid()
        o, _ = gated_delta_rule(q, k, v, g, beta, normalize_qk=True)
        return x + self.readout(o.flatten(-2))


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return Layer()


@pytest.mark.parametrize(("wanted", "enabled"), [(True, True), (True, False), (False, True)])
def test_keeps_where_a_gradient_is_wanted(problem, monkeypatch, wanted, enabled):
    """``keep`` is the op's last argument."""
    kept = []
    forward = op._forward_op
    monkeypatch.setattr(op, "_forward_op", lambda *args: kept.append(args[-1]) or forward(*args))
    p = problem(B=1, T=3, H=1, K=4, V=6)
    inputs = {name: x.requires_grad_(wanted and name == "beta") for name, x in p.inputs.items()}
    with torch.set_grad_enabled(enabled):
        gated_delta_rule(**inputs)
    assert kept == [wanted and enabled]


def gradients(layer, x, function=None):
    layer.zero_grad()
    (layer if function is None else function)(x).square().mean().backward()
    return [p.grad.clone() for p in layer.parameters()]


@pytest.mark.parametrize("cu_seqlens", [None, [0, 0, 1, 40]])
@pytest.mark.parametrize("state", [True, False])
def test_opcheck(problem, cu_seqlens, state):
    """torch's own test of a custom op: schema, fake kernel, autograd registration, AOT tracing with dynamic shapes."""
    p = problem(B=1, T=40, H=1, groups=2, K=4, V=6, cu_seqlens=cu_seqlens, state=state)
    *tokens, initial_state = (*(x.requires_grad_() for x in p.inputs.values()), *(() if state else (None,)))
    torch.library.opcheck(OP, (*tokens, 0.5, initial_state, p.options.get("cu_seqlens"), True, True))


def test_a_second_differentiation_is_refused(problem):
    p = problem(T=3)
    q, *rest = (x.requires_grad_() for x in p.inputs.values())
    o, _ = gated_delta_rule(q, *rest[:4])
    (dq,) = torch.autograd.grad(o.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        dq.sum().backward()


def test_each_result_can_be_used_alone(problem):
    p = problem(T=40)
    for used in (0, 1):
        leaves = [x.clone().requires_grad_() for x in p.inputs.values()]
        doubles = [x.detach().double().requires_grad_() for x in leaves]
        grads = []
        for function, (*tokens, state) in ((gated_delta_rule, leaves), (gated_delta_rule_reference, doubles)):
            result = function(*tokens, initial_state=state, output_final_state=True, **p.options)[used]
            grads.append(torch.autograd.grad(result.square().sum(), [*tokens, state], materialize_grads=True))
        for actual, expected in zip(*grads, strict=True):
            torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)


def test_the_final_state_is_returned_only_on_request(problem):
    p = problem(T=3)
    assert gated_delta_rule(**p.inputs)[1] is None


@pytest.mark.parametrize("cu_seqlens", [None, [0, 0, 1, 40]])
def test_compiles_in_one_graph(problem, cu_seqlens):
    p = problem(B=1, T=40, cu_seqlens=cu_seqlens)
    eager = p.solve(gated_delta_rule)
    # Inductor's cache on disk knows the graph, but not what a backend saves: it would outlive a change of that.
    with torch._inductor.config.patch(force_disable_caches=True):
        compiled = p.solve(torch.compile(gated_delta_rule, fullgraph=True))
    for name in eager:
        torch.testing.assert_close(compiled[name], eager[name], msg=name)


def test_a_compiled_layer_takes_new_lengths_without_recompiling(layer):
    """B and T are dynamic from their first change on: one recompilation, whatever comes."""
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for batch, time in ((2, 20), (3, 33), (4, 64), (5, 7), (2, 100)):
        x = torch.randn(batch, time, 8)
        for actual, expected in zip(gradients(layer, x, compiled), gradients(layer, x), strict=True):
            torch.testing.assert_close(actual, expected)
    assert counter.frame_count <= 2


def test_exports_as_one_node(layer):
    x = torch.randn(2, 20, 8)
    shapes = {"x": {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("time", min=2, max=4096)}}
    program = torch.export.export(layer, (x,), dynamic_shapes=shapes)
    assert [node.target for node in program.graph.nodes].count(OP) == 1
    for given in (x, torch.randn(3, 77, 8)):
        torch.testing.assert_close(program.module()(given), layer(given))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_changes_nothing(layer, use_reentrant):
    x = torch.randn(2, 40, 8, requires_grad=True)
    through = gradients(layer, x, lambda x: checkpoint(layer, x, use_reentrant=use_reentrant))
    assert all(torch.equal(a, b) for a, b in zip(through, gradients(layer, x), strict=True))


def test_autocast_casts_q_k_v_and_computes_in_fp32(problem):
    """q, k, v are rounded to bf16, and that is all: the gates and everything inside the op stay fp32."""
    p = problem(T=70)
    rounded = p.inputs | {name: p.inputs[name].bfloat16() for name in ("q", "k", "v")}
    expected, final = gated_delta_rule_reference(**rounded, output_final_state=True, **p.options)
    with torch.autocast("cpu", torch.bfloat16):
        o, state = gated_delta_rule(**p.inputs, output_final_state=True, **p.options)
    assert o.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    torch.testing.assert_close(state.double(), final, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(o, expected.bfloat16(), rtol=2**-7, atol=1e-5)


def test_a_backward_pass_inside_autocast_is_the_same(problem):
    """Autocast is on while autograd runs here; inside the op it must be off."""
    p = problem(T=70)
    leaves = [x.requires_grad_() for x in p.inputs.values()]
    grads = []
    for inside in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            o, _ = gated_delta_rule(*leaves[:5], initial_state=leaves[5], normalize_qk=True)
            if inside:
                grads.append(torch.autograd.grad(o.sum(), leaves))
        if not inside:
            grads.append(torch.autograd.grad(o.sum(), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_compiles_in_one_graph_under_autocast(problem):
    p = problem(T=40)
    compiled = torch.compile(gated_delta_rule, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = (function(**p.inputs, **p.options)[0] for function in (gated_delta_rule, compiled))
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual, expected)


def shard(layer):
    from torch.distributed.fsdp import fully_shard

    return fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))


def train_one_rank(rank: int, directory: str, wrap) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{directory}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.manual_seed(0)
    layer = wrap(Layer())
    x = torch.randn(2, 40, 8)
    layer(x[rank : rank + 1]).square().mean().backward()
    grads = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in layer.parameters()]
    if rank == 0:
        torch.save(grads, f"{directory}/gradients.pt")
    dist.barrier()
    os._exit(0)  # taking gloo's group down aborts or hangs one time in six (torch 2.13: "terminate called")


WRAPS = {"DDP": DistributedDataParallel, "FSDP2": shard}


@pytest.mark.parametrize("wrap", WRAPS)
def test_two_processes_average_their_gradients(tmp_path, wrap):
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "src"), "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, __file__]
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path), wrap], env=env) for rank in range(2)]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    torch.manual_seed(0)
    layer, x = Layer(), torch.randn(2, 40, 8)
    for actual, expected in zip(torch.load(tmp_path / "gradients.pt"), gradients(layer, x), strict=True):
        torch.testing.assert_close(actual, expected)


def test_flas_argument_names(problem):
    p = problem(B=1, T=40, cu_seqlens=[0, 10, 40])
    ours = gated_delta_rule(**p.inputs, **p.options, scale=0.5, output_final_state=True)
    theirs = chunk_gated_delta_rule(
        p.inputs["q"],
        p.inputs["k"],
        p.inputs["v"],
        g=p.inputs["g"],
        beta=p.inputs["beta"],
        scale=0.5,
        initial_state=p.inputs["initial_state"],
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
        cu_seqlens=p.options["cu_seqlens"],
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    with pytest.raises(TypeError, match="cp_context"):
        chunk_gated_delta_rule(*(p.inputs[name] for name in ("q", "k", "v", "g", "beta")), cp_context=None)


def test_importing_and_computing_on_the_cpu_needs_neither_triton_nor_the_engine():
    code = """
import sys, torch
from widthwise.kernels import gated_delta_rule
assert "triton" not in sys.modules
x = torch.ones(1, 2, 1, 4, requires_grad=True)
gated_delta_rule(x, x, x, -x[..., 0], x[..., 0])[0].sum().backward()  # here torch itself may import triton
for prefix in ("widthwise.kernels.triton", "widthwise.derive", "widthwise.codegen"):
    assert not any(name.startswith(prefix) for name in sys.modules), prefix
"""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    subprocess.run([sys.executable, "-c", code], check=True, env=env)


if __name__ == "__main__":
    train_one_rank(int(sys.argv[1]), sys.argv[2], WRAPS[sys.argv[3]])
