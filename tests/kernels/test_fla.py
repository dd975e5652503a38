"""FLA's tolerances on FLA's shapes: those of its tests of the chunked gated delta rule (tests/ops/test_gdn.py, 0.6.0).

Inputs are drawn as there: keys from [0, 1), so that all of them lie within a narrow cone, betas from 0.5 to 0.73, and
gates that are switched off at random. The relative L2 error is FLA's "RMS ratio"; as there, what is nowhere off by
more than 1e-6 passes (gates of -30 to -70 a token leave 1e-14 of dg).
"""

import pytest
import torch
import torch.nn.functional as F

from widthwise.kernels import gated_delta_rule
from widthwise.kernels.fla import chunk_gated_delta_rule

TOLERANCE = {"o": 0.005, "final_state": 0.005, "dq": 0.008, "dk": 0.008, "dv": 0.008, "dbeta": 0.02, "dg": 0.02}
TOLERANCE["dinitial_state"] = 0.008
# B, T, H, HV, K = V, scale, divisor of the gates, share of gates that are 0, q and k normalized inside; all in fp16
SHAPES = [
    (4, 1024, 4, 4, 128, 0.1, 1, 1.0, False),
    (2, 75, 4, 4, 64, 1, 0.01, 0, False),
    (2, 500, 3, 3, 60, 1, 1, 0, False),
    (2, 1000, 3, 3, 64, 0.1, 1, 0.5, False),
    (3, 1024, 4, 4, 100, 1, 0.1, 0, False),
    (4, 1024, 4, 4, 128, 0.1, 1, 0, True),
    (2, 1500, 4, 4, 128, 0.1, 10, 0, False),
    (4, 2048, 8, 8, 64, 0.1, 1, 0, False),
    (2, 256, 2, 4, 64, 1, 1, 0, False),
    (2, 512, 2, 8, 64, 1, 0.1, 0, True),
    (2, 1024, 4, 8, 128, 0.1, 1, 0, False),
]
VARLEN_TOLERANCE = TOLERANCE | {"dq": 0.007, "dv": 0.007, "dbeta": 0.015, "dg": 0.015, "dinitial_state": 0.007}
# H, HV, K = V, share of gates that are 0, cu_seqlens
PACKED = [
    (4, 4, 60, 0, [0, 15]),
    (4, 4, 64, 0, [0, 256, 500, 1000]),
    (4, 4, 64, 0.5, [0, 256, 500, 1000]),
    (4, 4, 100, 0, [0, 15, 100, 300, 1200, 2000]),
    (2, 4, 64, 0, [0, 256, 500, 1000]),
    (2, 8, 64, 0, [0, 256, 500, 1000]),
]


def assert_within(tolerance, inputs, grads, **options):
    """Ours, by FLA's name, against the same function in float64, which takes the chunked path in plain PyTorch."""
    results = []
    for function, device, dtype, norm in (
        (chunk_gated_delta_rule, inputs["q"].device, None, "use_qk_l2norm_in_kernel"),
        (gated_delta_rule, "cpu", torch.float64, "normalize_qk"),
    ):
        leaves = {name: x.detach().to(device, dtype).requires_grad_() for name, x in inputs.items()}
        others = {norm if name == "norm" else name: x for name, x in options.items()}
        if "cu_seqlens" in others:
            others["cu_seqlens"] = others["cu_seqlens"].to(device)
        o, final_state = function(**leaves, output_final_state=True, **others)
        back = torch.autograd.grad((o, final_state), list(leaves.values()), [x.to(device, dtype) for x in grads])
        named = {"o": o, "final_state": final_state} | {f"d{name}": x for name, x in zip(leaves, back, strict=True)}
        results.append({name: x.detach().cpu().double() for name, x in named.items()})
    errors = {name: float((a - results[1][name]).norm() / results[1][name].norm()) for name, a in results[0].items()}
    off = {name: float((a - results[1][name]).abs().max()) for name, a in results[0].items()}
    wrong = {name: error for name, error in errors.items() if not (error <= tolerance[name] or off[name] <= 1e-6)}
    assert not wrong, f"above FLA's tolerances: {wrong}"


def check(device, B, T, H, HV, D, scale, divisor, masked, norm):
    torch.manual_seed(42)
    q, k = (torch.rand(B, T, H, D, dtype=torch.float16) for _ in range(2))
    if not norm:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    g = F.logsigmoid(torch.rand(B, T, HV)) / divisor * (torch.rand(B, T, HV) > masked)
    inputs = {"q": q, "k": k, "v": torch.rand(B, T, HV, D, dtype=torch.float16), "g": g}
    inputs |= {"beta": torch.rand(B, T, HV).sigmoid(), "initial_state": torch.zeros(B, HV, D, D)}
    grads = torch.randn(B, T, HV, D).half(), torch.randn(B, HV, D, D)
    inputs, grads = {name: x.to(device) for name, x in inputs.items()}, [x.to(device) for x in grads]
    assert_within(TOLERANCE, inputs, grads, scale=scale, norm=norm)


def check_packed(device, H, HV, D, masked, cu_seqlens):
    torch.manual_seed(42)
    T, N = cu_seqlens[-1], len(cu_seqlens) - 1
    g = F.logsigmoid(torch.rand(1, T, HV)).half() * (torch.rand(1, T, HV) > masked)
    inputs = {"q": torch.randn(1, T, H, D).half(), "k": F.normalize(torch.randn(1, T, H, D), dim=-1).half()}
    inputs |= {"v": torch.randn(1, T, HV, D).half(), "g": g, "beta": torch.rand(1, T, HV).sigmoid()}
    inputs |= {"initial_state": torch.randn(N, HV, D, D)}
    grads = torch.randn(1, T, HV, D).half(), torch.rand(N, HV, D, D)
    inputs, grads = {name: x.to(device) for name, x in inputs.items()}, [x.to(device) for x in grads]
    assert_within(VARLEN_TOLERANCE, inputs, grads, cu_seqlens=torch.tensor(cu_seqlens), norm=False)


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[2], SHAPES[9]], ids=str)
def test_on_the_cpu(shape):
    check("cpu", *shape)


@pytest.mark.parametrize("shape", PACKED[:2], ids=str)
def test_packed_on_the_cpu(shape):
    check_packed("cpu", *shape)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_on_the_gpu(shape):
    check("cuda", *shape)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", PACKED, ids=str)
def test_packed_on_the_gpu(shape):
    check_packed("cuda", *shape)
