"""The decode kernel against one token of the float64 oracle: small shapes in Triton's interpreter, all on a GPU.

The interpreter must be switched on before triton is imported, so its cases run in a process of their own: this file.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from widthwise.kernels import gated_delta_rule, gated_delta_rule_reference, gated_delta_rule_step

PUBLISHED = [(24, 48), (32, 64), (96, 192), (192, 384), (256, 512), (128, 128)]
# The state is fp32 whatever the inputs, and o is rounded to their dtype: half a unit in the last place.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def draw(batch, heads, groups, key_dim, value_dim, dtype, *, device="cuda", g=None, zero=False):
    """q, k, v, g, beta, state of one token; ``zero``: the first row of q and of k is zero."""
    draws = torch.Generator(device).manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=draws, device=device)

    q, k, v = normal(batch, heads, key_dim), normal(batch, heads, key_dim), normal(batch, heads * groups, value_dim)
    gates, beta = -0.2 * normal(batch, heads * groups).abs(), normal(batch, heads * groups).sigmoid()
    if g is not None:
        gates = torch.full_like(gates, g)
    if zero:
        q[0, 0], k[0, 0] = 0.0, 0.0
    state = normal(batch, heads * groups, key_dim, value_dim)
    return *(x.to(dtype) for x in (q, k, v)), gates, beta.to(dtype), state


def errors(tokens, **options):
    """Relative L2 errors of o and the new state to the oracle."""
    *inputs, state = tokens
    found = gated_delta_rule_step(*tokens, **options)
    o, final = gated_delta_rule_reference(
        *(x.unsqueeze(1) for x in inputs), initial_state=state, output_final_state=True, **options
    )
    assert (found[0].dtype, found[1].dtype) == (tokens[0].dtype, torch.float32)
    wanted = (o.squeeze(1), final)
    return [float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in zip(found, wanted, strict=True)]


def assert_right(tokens, **options):
    o, state = errors(tokens, **options)
    assert o <= TOLERANCE[tokens[0].dtype], o
    assert state <= 1e-6, state


def interpret() -> None:
    """Fails where the interpreter does."""
    for normalize in (True, False):
        for dtype in TOLERANCE:
            assert_right(draw(2, 1, 2, 24, 48, dtype, device="cpu"), normalize_qk=normalize)
    for key_dim, value_dim in ((1, 1), (3, 5), (128, 33), (130, 16)):
        assert_right(draw(1, 2, 1, key_dim, value_dim, torch.float32, device="cpu"), normalize_qk=True, scale=0.3)
    for g in (0.0, -1e-4, -50.0, -1e4, -torch.inf):
        assert_right(draw(1, 1, 4, 8, 8, torch.float32, device="cpu", g=g))
    assert_right(draw(2, 2, 1, 8, 8, torch.float16, device="cpu", zero=True), normalize_qk=True)
    # Heads cut from one projection, an expanded gate, a state that lies transposed: nothing is contiguous.
    q, k, v, g, beta, state = draw(3, 2, 1, 8, 8, torch.float32, device="cpu")
    packed = torch.stack([q, k, v], -2).flatten(-2)
    views = (*packed.split(8, -1), g[:, :1].expand(-1, 2), beta.mT.contiguous().mT, state.mT.contiguous().mT)
    assert not any(x.is_contiguous() for x in views)
    assert_right(views, normalize_qk=True)
    # An empty batch.
    assert gated_delta_rule_step(*draw(0, 2, 1, 8, 8, torch.float32, device="cpu"))[1].shape == (0, 2, 8, 8)
    # The given state is not written to; one that autograd watches goes through PyTorch, and to the same numbers.
    tokens = draw(1, 2, 1, 8, 8, torch.float32, device="cpu")
    before = tokens[-1].clone()
    o, after = gated_delta_rule_step(*tokens)
    assert torch.equal(tokens[-1], before)
    o2, after2 = gated_delta_rule_step(*tokens[:-1], before.requires_grad_())
    assert after2.grad_fn is not None
    torch.testing.assert_close((o2.detach(), after2.detach()), (o, after))
    # torch's own test of the op: its schema, and its shapes on fake tensors.
    torch.library.opcheck(torch.ops.widthwise.gated_delta_rule_step.default, (*tokens, 0.5, True))


def test_interpreter():
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root / "src"), "PYTHONWARNINGS": "ignore"}
    run = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("key_dim", "value_dim"), PUBLISHED)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("normalize_qk", [True, False])
def test_on_the_gpu(dtype, key_dim, value_dim, groups, normalize_qk):
    assert_right(draw(5, 2, groups, key_dim, value_dim, dtype, zero=True), normalize_qk=normalize_qk)


@pytest.mark.gpu
@pytest.mark.parametrize("g", [0.0, -1e-4, -5.0, -50.0, -1e4, -torch.inf])
def test_gates_on_the_gpu(g):
    assert_right(draw(2, 2, 1, 128, 128, torch.bfloat16, g=g), normalize_qk=True)


@pytest.mark.gpu
def test_decoding_as_a_server_does():
    """A prompt by the scan, then steps, eagerly and in a CUDA graph whose state is updated in place."""
    torch.manual_seed(0)
    q, k = (torch.randn(2, 70, 2, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    v = torch.randn(2, 70, 4, 128, device="cuda", dtype=torch.bfloat16)
    g, beta = -0.2 * torch.rand(2, 70, 4, device="cuda"), torch.rand(2, 70, 4, device="cuda")
    tokens = (q, k, v, g, beta)
    options = {"normalize_qk": True, "output_final_state": True}
    whole, last = gated_delta_rule_reference(*tokens, **options)
    _, state = gated_delta_rule(*(x[:, :64] for x in tokens), **options)
    slots = [x[:, 64].contiguous() for x in tokens]
    held = state.clone()

    def decode():
        o, after = gated_delta_rule_step(*slots, held, normalize_qk=True)
        held.copy_(after)
        return o

    decode()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = decode()
    held.copy_(state)
    for t in range(64, 70):
        for slot, x in zip(slots, tokens, strict=True):
            slot.copy_(x[:, t])
        o, state = gated_delta_rule_step(*slots, state, normalize_qk=True)
        graph.replay()
        assert torch.equal(o, captured)
        assert torch.equal(state, held)
        assert (o - whole[:, t]).norm() < 6e-3 * whole[:, t].norm()
    assert (state - last).norm() < 6e-3 * last.norm()


if __name__ == "__main__":
    interpret()
