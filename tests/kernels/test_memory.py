"""Memory comes back when nothing shares it any more, and never before."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from widthwise.kernels import gated_delta_rule
from widthwise.kernels.memory import SMALL, Pool, pool

LIKE = torch.empty(0)
ROWS = SMALL // 4  # floats of a block that is just large enough to be pooled


def test_a_block_is_handed_out_again_once_its_last_view_is_gone():
    mine = Pool()
    x = mine.empty((2, ROWS), LIKE, torch.float32)
    address, view = x.data_ptr(), x[1]
    del x
    assert not mine.idle
    del view
    assert list(mine.idle) == [address]
    larger = mine.empty((ROWS + 1, 2), LIKE, torch.float32)
    assert larger.data_ptr() != address
    again = mine.empty((ROWS, 3, 1), LIKE, torch.float16)  # smaller, of another shape and type
    assert again.data_ptr() == address
    assert again.shape == (ROWS, 3, 1)
    assert again.dtype == torch.float16
    assert again.is_contiguous()


def test_what_autograd_has_saved_is_in_use():
    mine = Pool()
    x = mine.empty((ROWS,), LIKE, torch.float32).fill_(2.0)
    weight = torch.ones(ROWS, requires_grad=True)
    product = (weight * x).sum()
    del x
    assert not mine.idle
    product.backward()
    assert len(mine.idle) == 1
    assert torch.equal(weight.grad, torch.full((ROWS,), 2.0))


def test_much_smaller_tensors_do_not_take_a_block():
    mine = Pool()
    address = mine.empty((8, ROWS), LIKE, torch.float32).data_ptr()
    assert mine.empty((3, ROWS), LIKE, torch.float32).data_ptr() != address


def test_no_more_than_the_bound_lies_idle():
    mine = Pool(kept=8 * SMALL)
    for blocks in range(1, 12):
        alive = [mine.empty((ROWS + n,), LIKE, torch.float32) for n in range(blocks)]
        del alive
        assert sum(block.numel() for block in mine.idle.values()) <= mine.kept


@pytest.mark.parametrize("shape", [(), (0,), (SMALL // 4 - 1,)])
def test_small_tensors_are_pytorchs_own(shape):
    mine = Pool()
    assert mine.empty(shape, LIKE, torch.float32).shape == shape
    assert not mine.idle


def test_other_devices_have_memory_of_their_own():
    assert Pool().empty((ROWS,), torch.empty(0, device="meta"), torch.float32).device.type == "meta"


def large(problem, seed=0):
    """Large enough to be pooled throughout."""
    return problem(B=2, T=256, H=4, K=32, V=32, seed=seed)


def test_graphs_that_are_alive_together_share_nothing(problem):
    problems = [large(problem, seed) for seed in range(3)]
    alone = [p.solve(gated_delta_rule) for p in problems]
    leaves = [[x.clone().requires_grad_() for x in p.inputs.values()] for p in problems]
    outputs = [gated_delta_rule(*x[:5], initial_state=x[5], normalize_qk=True, output_final_state=True) for x in leaves]
    for twice in (True, False):
        for p, x, output, expected in zip(problems, leaves, outputs, alone, strict=True):
            grads = torch.autograd.grad(output, x, (p.do, p.dfinal), retain_graph=twice)
            for name, grad in zip(p.inputs, grads, strict=True):
                assert torch.equal(grad, expected[f"d{name}"])


def test_threads_share_the_pool(problem):
    p = large(problem)
    expected = p.solve(gated_delta_rule)
    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(lambda _: p.solve(gated_delta_rule), range(12)))
    assert all(torch.equal(found[name], expected[name]) for found in results for name in expected)


def test_works_after_inference_mode(problem):
    p = large(problem)
    expected = p.solve(gated_delta_rule)
    pool.idle.clear()
    with torch.inference_mode():
        gated_delta_rule(*list(p.inputs.values())[:5], normalize_qk=True)
    found = p.solve(gated_delta_rule)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
