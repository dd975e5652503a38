"""The oracle is held against the published formula and against cases whose answer is known."""

import math

import torch

from widthwise.kernels import gated_delta_rule_reference
from widthwise.kernels.reference import l2_normalize


def test_is_the_published_recurrence(problem):
    """S_t = exp(g_t) S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T with S [V, K], o_t = scale S_t q_t."""
    p = problem(B=1, T=7, H=1, K=3, V=5, normalize_qk=False, dtype=torch.float64)
    o, final = gated_delta_rule_reference(**p.inputs, output_final_state=True, scale=0.7)
    q, k, v, g, beta = (p.inputs[name][0, :, 0] for name in ("q", "k", "v", "g", "beta"))
    S = p.inputs["initial_state"][0, 0].mT
    for t in range(7):
        S = math.exp(g[t]) * S @ (torch.eye(3) - beta[t] * torch.outer(k[t], k[t])) + beta[t] * torch.outer(v[t], k[t])
        torch.testing.assert_close(o[0, t, 0], 0.7 * S @ q[t])
    torch.testing.assert_close(final[0, 0].mT, S)


def test_orthonormal_keys_are_an_exact_memory():
    """Without decay, at beta = 1 and scale 1, a query equal to a key reads back the value last written under it."""
    k = torch.eye(4)[None, [0, 1, 2, 3, 1], None]
    v = torch.arange(15.0).reshape(1, 5, 1, 3)
    _, state = gated_delta_rule_reference(
        k, k, v, torch.zeros(1, 5, 1), torch.ones(1, 5, 1), scale=1.0, output_final_state=True
    )
    assert torch.equal(state[0, 0], v[0, [0, 4, 2, 3], 0].double())


def test_each_head_serves_consecutive_value_heads(problem):
    p = problem(T=5, H=2, groups=3)
    o, _ = gated_delta_rule_reference(**p.inputs, **p.options)
    for head in range(6):
        single = {name: x[:, :, head : head + 1] for name, x in p.inputs.items() if name in ("v", "g", "beta")}
        single |= {name: p.inputs[name][:, :, head // 3 : head // 3 + 1] for name in ("q", "k")}
        alone, _ = gated_delta_rule_reference(
            **single, initial_state=p.inputs["initial_state"][:, head : head + 1], **p.options
        )
        torch.testing.assert_close(o[:, :, head : head + 1], alone)


def test_packed_sequences_are_separate_ones(problem):
    p = problem(B=1, T=9, cu_seqlens=[0, 4, 4, 9])
    o, final = gated_delta_rule_reference(**p.inputs, **p.options, output_final_state=True)
    for n, (start, end) in enumerate([(0, 4), (4, 4), (4, 9)]):
        part = {name: x[:, start:end] for name, x in p.inputs.items() if name != "initial_state"}
        state = p.inputs["initial_state"][n : n + 1]
        alone = gated_delta_rule_reference(**part, initial_state=state, normalize_qk=True, output_final_state=True)
        torch.testing.assert_close(o[:, start:end], alone[0])
        torch.testing.assert_close(final[n : n + 1], alone[1])


def test_normalization_of_a_zero_row_is_zero():
    x = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    y = l2_normalize(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, torch.zeros_like(y))
    torch.testing.assert_close(grad, torch.full_like(grad, 1e3))  # 1 / sqrt(1e-6)
