"""The CPU path against the float64 oracle: forward and every gradient, to a relative L2 error of 1e-5 in fp32."""

import pytest
import torch

from widthwise.kernels import gated_delta_rule, gated_delta_rule_reference
from widthwise.kernels.chunked import CHUNK

TOLERANCE = 1e-5
PAIRS = [(24, 48), (32, 64), (96, 192), (128, 128), (192, 384), (256, 512)]
TIMES = [1, 2, 15, CHUNK - 1, CHUNK, CHUNK + 1, 63, 64, 65, 200]
GATES = [0.0, -1e-4, -5.0, -50.0, -1e4]
LENGTHS = [0, 0, 1, 66, 66, 67, 131, 200, 200]  # empty first, in the middle and last; of length 1; whole chunks


@pytest.mark.parametrize("T", sorted(set(TIMES)))
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_lengths_and_value_groups(problem, agrees, T, groups):
    agrees(problem(B=2, T=T, H=2, groups=groups, seed=T), gated_delta_rule, TOLERANCE)


@pytest.mark.parametrize(("K", "V"), PAIRS)
@pytest.mark.parametrize("normalize_qk", [True, False])
def test_head_sizes(problem, agrees, K, V, normalize_qk):
    agrees(problem(B=1, T=70, H=1, groups=2, K=K, V=V, normalize_qk=normalize_qk), gated_delta_rule, TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("T", [1000, 2048])
@pytest.mark.parametrize(("K", "V"), PAIRS[:4])
def test_long_sequences(problem, agrees, T, K, V):
    agrees(problem(B=1, T=T, H=1, groups=1, K=K, V=V), gated_delta_rule, TOLERANCE)


def test_a_long_sequence(problem, agrees):
    agrees(problem(B=1, T=1000, H=1, K=8, V=8), gated_delta_rule, TOLERANCE)


@pytest.mark.parametrize("gate", [*GATES, tuple(GATES)], ids=str)
@pytest.mark.parametrize("write", [None, 0.0, 1.0])
def test_gates_and_writing_strengths(problem, agrees, gate, write):
    agrees(problem(B=1, T=130, gate=gate, write=write), gated_delta_rule, TOLERANCE)


def test_a_gate_of_minus_infinity_forgets_everything(problem, agrees):
    p = problem(B=1, T=70)
    p.inputs["g"][:, [0, 40, 69]] = -torch.inf
    results = p.solve(gated_delta_rule)
    assert all(x.isfinite().all() for x in results.values())
    p.inputs["g"][:, [0, 40, 69]] = -1e4
    for name, expected in p.solve(gated_delta_rule_reference, double=True).items():
        torch.testing.assert_close(results[name].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("normalize_qk", [True, False])
@pytest.mark.parametrize("gate", [0.0, -1e-4, None])
def test_repeated_keys(problem, agrees, normalize_qk, gate):
    p = problem(B=1, T=130, write=1.0, gate=gate, normalize_qk=normalize_qk)
    k = torch.nn.functional.normalize(p.inputs["k"], dim=-1)
    p.inputs["k"] = k[:, :1].expand_as(k)
    agrees(p, gated_delta_rule, TOLERANCE)


@pytest.mark.parametrize("normalize_qk", [True, False])
def test_zero_rows(problem, agrees, normalize_qk):
    p = problem(T=40, normalize_qk=normalize_qk)
    p.inputs["q"][0, 3], p.inputs["k"][0, 5], p.inputs["k"][1, 0] = 0, 0, 0
    agrees(p, gated_delta_rule, TOLERANCE)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("state", [True, False])
def test_packed_sequences(problem, agrees, groups, state):
    agrees(problem(B=1, T=200, groups=groups, cu_seqlens=LENGTHS, state=state), gated_delta_rule, TOLERANCE)


def test_padding_rows_read_nothing(problem):
    """A NaN in one packed sequence stays there: padded rows must not pick up other tokens' values."""
    p = problem(B=1, T=20, cu_seqlens=[0, 7, 20])
    clean = p.solve(gated_delta_rule)
    for name in ("q", "k", "v", "beta"):
        p.inputs[name][:, :7] = torch.nan
    dirty = p.solve(gated_delta_rule)
    assert torch.equal(dirty["o"][:, 7:], clean["o"][:, 7:])
    assert torch.equal(dirty["dk"][:, 7:], clean["dk"][:, 7:])
    assert torch.equal(dirty["dinitial_state"][1], clean["dinitial_state"][1])


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_scale(problem, agrees, scale):
    agrees(problem(T=40, scale=scale), gated_delta_rule, TOLERANCE)


def test_without_an_initial_state(problem, agrees):
    agrees(problem(T=70, state=False), gated_delta_rule, TOLERANCE)


def test_strided_inputs(problem, agrees):
    """Slices of a fused projection, heads in front of time, and an expanded gate: nothing here is contiguous."""
    p = problem(B=2, T=70, K=24, V=24)
    fused = torch.cat([p.inputs[name] for name in ("q", "k", "v")], dim=-1)
    p.inputs |= {name: x[..., :24] for name, x in zip(("q", "k"), fused.split([24, 48], -1), strict=True)}
    p.inputs["v"] = fused[..., 48:]
    p.inputs["beta"] = p.inputs["beta"].transpose(1, 2).contiguous().transpose(1, 2)
    p.inputs["g"] = p.inputs["g"][:, :, :1].expand(-1, -1, 2)
    p.inputs["initial_state"] = p.inputs["initial_state"].mT.contiguous().mT
    p.do = p.do.transpose(1, 2).contiguous().transpose(1, 2)
    assert not any(x.is_contiguous() for x in (*p.inputs.values(), p.do))
    agrees(p, gated_delta_rule, TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_fp32(problem, agrees, dtype):
    """Only the rounding of each result to 16 bits is left."""
    agrees(problem(T=70, dtype=dtype), gated_delta_rule, 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11)


@pytest.mark.parametrize("cut", [1, 32, 50, 64, 99])
def test_two_calls_equal_one(problem, cut):
    """The state is all that passes from one call to the next, forward and backward."""
    p = problem(T=100)

    def in_two(q, k, v, g, beta, initial_state, output_final_state, normalize_qk):
        tokens = (q, k, v, g, beta)
        first, state = gated_delta_rule(
            *(x[:, :cut] for x in tokens), initial_state=initial_state, output_final_state=True, normalize_qk=True
        )
        second, state = gated_delta_rule(
            *(x[:, cut:] for x in tokens), initial_state=state, output_final_state=True, normalize_qk=True
        )
        return torch.cat([first, second], dim=1), state

    once, twice = p.solve(gated_delta_rule), p.solve(in_two)
    for name, expected in once.items():
        assert (twice[name] - expected).norm() <= TOLERANCE * expected.norm(), name


def test_two_runs_give_the_same_bits(problem):
    p = problem(B=3, T=200, H=2, groups=2, K=32, V=64)
    first, second = p.solve(gated_delta_rule), p.solve(gated_delta_rule)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_no_tokens(problem):
    p = problem(T=0)
    results = p.solve(gated_delta_rule)
    assert torch.equal(results["final_state"], p.inputs["initial_state"])
    assert torch.equal(results["dinitial_state"], p.dfinal)
    assert results["o"].shape == (2, 0, 2, 48)


@pytest.mark.parametrize("normalize_qk", [True, False])
@pytest.mark.parametrize("cu_seqlens", [None, [0, 1, 1, CHUNK + 2]])
def test_gradcheck(problem, normalize_qk, cu_seqlens):
    p = problem(B=1, T=CHUNK + 2, H=1, K=2, V=3, dtype=torch.float64, normalize_qk=normalize_qk, cu_seqlens=cu_seqlens)
    leaves = [x.requires_grad_() for x in p.inputs.values()]

    def function(q, k, v, g, beta, initial_state):
        return gated_delta_rule(q, k, v, g, beta, initial_state=initial_state, output_final_state=True, **p.options)

    # g < 0 throughout, so the finite differences do not cross the check of its sign
    assert torch.autograd.gradcheck(function, leaves, fast_mode=cu_seqlens is not None)


def test_float64_agrees_to_rounding(problem, agrees):
    agrees(problem(T=100, groups=2, dtype=torch.float64, gate=(-1e-4, -1.0, -50.0)), gated_delta_rule, 1e-13)
