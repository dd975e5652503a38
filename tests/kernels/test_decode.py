"""T decode steps are the scan over T tokens: same outputs, same state, same gradients."""

import pytest
import torch

from widthwise.kernels import gated_delta_rule, gated_delta_rule_step


def step_by_step(q, k, v, g, beta, *, initial_state, output_final_state, **options):
    outputs, state = [], initial_state
    for t in range(q.shape[1]):
        o, state = gated_delta_rule_step(q[:, t], k[:, t], v[:, t], g[:, t], beta[:, t], state, **options)
        outputs.append(o)
    return torch.stack(outputs, dim=1), state


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("normalize_qk", [True, False])
@pytest.mark.parametrize("scale", [None, 1.0])
def test_steps_equal_the_oracle_and_the_scan(problem, agrees, groups, normalize_qk, scale):
    p = problem(T=40, groups=groups, normalize_qk=normalize_qk, scale=scale)
    agrees(p, step_by_step, 1e-5)
    steps, scan = p.solve(step_by_step), p.solve(gated_delta_rule)
    for name in scan:
        torch.testing.assert_close(steps[name], scan[name], rtol=1e-4, atol=1e-5)


def test_continues_a_prefill_in_bf16(problem):
    """As in generation: the scan over the prompt, then steps. The state stays fp32, outputs are bf16."""
    p = problem(T=50, dtype=torch.bfloat16, state=False)
    whole, _ = gated_delta_rule(*p.inputs.values(), normalize_qk=True)
    prompt = [x[:, :40] for x in p.inputs.values()]
    _, state = gated_delta_rule(*prompt, normalize_qk=True, output_final_state=True)
    rest = [x[:, 40:] for x in p.inputs.values()]
    o, state = step_by_step(*rest, initial_state=state, output_final_state=True, normalize_qk=True)
    assert o.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    assert (o - whole[:, 40:]).float().norm() <= 2**-8 * whole[:, 40:].float().norm()


def test_leaves_the_given_state_alone(problem):
    p = problem(T=1)
    state = p.inputs.pop("initial_state")
    before = state.clone()
    gated_delta_rule_step(*(x[:, 0] for x in p.inputs.values()), state)
    assert torch.equal(state, before)


def test_compiles_in_one_graph(problem):
    p = problem(T=1)
    *tokens, state = p.inputs.values()
    tokens = [x[:, 0] for x in tokens]
    compiled = torch.compile(gated_delta_rule_step, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(*tokens, state), gated_delta_rule_step(*tokens, state), strict=True):
        torch.testing.assert_close(actual, expected)
