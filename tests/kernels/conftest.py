"""Inputs for the scan and the comparison with its float64 oracle, as fixtures that hand out functions."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from widthwise.kernels import gated_delta_rule_reference

NAMES = ("q", "k", "v", "g", "beta", "initial_state")


@dataclass
class Problem:
    """One call: its differentiable inputs, its other arguments, and the gradients of its two results."""

    inputs: dict[str, Tensor]
    do: Tensor
    dfinal: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def solve(self, function: Callable[..., Any], double: bool = False) -> dict[str, Tensor]:
        """o, final_state and every gradient, by ``function`` on fresh leaves (in float64 if ``double``)."""
        dtype = torch.float64 if double else None
        # A leaf that keeps the strides of its input, so that strided problems stay strided.
        leaves = {name: x.detach().to(dtype or x.dtype).requires_grad_() for name, x in self.inputs.items()}
        o, final_state = function(*list(leaves.values())[:5], **self.kwargs(leaves), output_final_state=True)
        grads = torch.autograd.grad(
            (o, final_state), list(leaves.values()), (self.do.to(o.dtype), self.dfinal.to(final_state.dtype))
        )
        results = {"o": o.detach(), "final_state": final_state.detach()}
        return results | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}

    def kwargs(self, leaves: dict[str, Tensor]) -> dict[str, Any]:
        state = leaves.get("initial_state")
        return self.options | ({} if state is None else {"initial_state": state})


def make_problem(
    B: int = 2,
    T: int = 65,
    H: int = 2,
    groups: int = 1,
    K: int = 24,
    V: int = 48,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    gate: float | tuple[float, ...] | None = None,
    write: float | None = None,
    normalize_qk: bool = True,
    state: bool = True,
    cu_seqlens: list[int] | None = None,
    **options: Any,
) -> Problem:
    """Fresh random inputs. ``gate`` fixes g (or draws it from a tuple), ``write`` fixes beta; raw q, k (not normalized
    by the op) have squared norms around 1, as the recurrence needs to stay bounded."""
    draw = torch.Generator().manual_seed(seed)
    HV, N = H * groups, B if cu_seqlens is None else len(cu_seqlens) - 1

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    q, k, v = normal(B, T, H, K), normal(B, T, H, K), normal(B, T, HV, V)
    if not normalize_qk:
        q, k = q * K**-0.5, k * K**-0.5
    g, beta = -normal(B, T, HV).exp() * 0.3, normal(B, T, HV).sigmoid()
    if gate is not None:
        choices = torch.tensor(gate, dtype=torch.float64).reshape(-1)
        g = choices[torch.randint(len(choices), g.shape, generator=draw)]
    if write is not None:
        beta = torch.full_like(beta, write)
    inputs = {"q": q, "k": k, "v": v, "g": g, "beta": beta}
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    if state:
        inputs["initial_state"] = normal(N, HV, K, V).to(torch.float64 if dtype == torch.float64 else torch.float32)
    options |= {"normalize_qk": normalize_qk}
    if cu_seqlens is not None:
        options["cu_seqlens"] = torch.tensor(cu_seqlens)
    return Problem(inputs, normal(B, T, HV, V).to(dtype), normal(N, HV, K, V).to(dtype), options)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Relative L2 error; where the expected tensor is 0, so must be the actual one."""
    actual, expected = actual.double(), expected.double()
    if expected.norm() == 0:
        return 0.0 if actual.norm() == 0 else float("inf")
    return float((actual - expected).norm() / expected.norm())


def errors_to_oracle(problem: Problem, function: Callable[..., Any]) -> dict[str, float]:
    expected = problem.solve(gated_delta_rule_reference, double=True)
    actual = problem.solve(function)
    assert actual.keys() == expected.keys()
    for name in problem.inputs:
        assert actual[f"d{name}"].shape == problem.inputs[name].shape
        assert actual[f"d{name}"].dtype == problem.inputs[name].dtype
    return {name: relative_error(actual[name], expected[name]) for name in expected}


@pytest.fixture
def problem() -> Callable[..., Problem]:
    """``problem(B=..., T=..., ...) -> Problem``; see :func:`make_problem`."""
    return make_problem


@pytest.fixture
def agrees() -> Callable[..., None]:
    """``agrees(problem, function, tolerance)``: every result and gradient is within ``tolerance`` of the oracle's."""

    def check(problem: Problem, function: Callable[..., Any], tolerance: float) -> None:
        errors = errors_to_oracle(problem, function)
        wrong = {name: error for name, error in errors.items() if not error <= tolerance}
        assert not wrong, f"relative L2 errors above {tolerance}: {wrong}"

    return check
