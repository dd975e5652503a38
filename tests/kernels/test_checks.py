"""Wrong arguments are a ValueError that names the argument, what it is, and what is accepted."""

import gc

import pytest
import torch

from widthwise.kernels import checks, gated_delta_rule, gated_delta_rule_step

ones = torch.ones


def call(**changes):
    """A call that is right (B=2, T=5, H=2, HV=4, K=3, V=6) but for ``changes``."""
    right = {
        "q": ones(2, 5, 2, 3),
        "k": ones(2, 5, 2, 3),
        "v": ones(2, 5, 4, 6),
        "g": -ones(2, 5, 4),
        "beta": ones(2, 5, 4),
        "initial_state": ones(2, 4, 3, 6),
    }
    return gated_delta_rule(**(right | changes))


def packed(cu_seqlens, **changes):
    one = {name: ones(1, 5, 2, 3) for name in ("q", "k")} | {name: -ones(1, 5, 4) for name in ("g", "beta")}
    return call(**(one | {"v": ones(1, 5, 4, 6), "initial_state": None, "cu_seqlens": cu_seqlens} | changes))


def test_the_calls_below_are_right_but_for_one_argument():
    call()
    packed(torch.tensor([0, 2, 5]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": None}, r"q is NoneType; accepted: a tensor of shape \[B, T, H, K\]"),
        ({"q": ones(2, 5, 3)}, r"q is a tensor of shape \[2, 5, 3\]; accepted: a tensor of shape \[B, T, H, K\]"),
        ({"k": ones(2, 5, 2, 4)}, r"k.shape is \[2, 5, 2, 4\]; accepted: q's shape, \[2, 5, 2, 3\]"),
        ({"k": ones(2, 6, 2, 3)}, r"k.shape is \[2, 6, 2, 3\]; accepted: q's shape"),
        ({"v": ones(2, 5, 6)}, r"v.shape is \[2, 5, 6\]; accepted: as many axes as q"),
        ({"v": ones(2, 4, 4, 6)}, r"v.shape is \[2, 4, 4, 6\]; accepted: the leading axes of q"),
        ({"v": ones(2, 5, 3, 6)}, r"v.shape is \[2, 5, 3, 6\]; accepted: .* a multiple of q's, 2"),
        ({"v": ones(2, 5, 0, 6)}, r"v.shape is \[2, 5, 0, 6\]; accepted: at least one head"),
        ({"q": ones(2, 5, 2, 0), "k": ones(2, 5, 2, 0)}, r"q.shape is \[2, 5, 2, 0\]; accepted: .* one key channel"),
        ({"g": -ones(2, 5, 2)}, r"g.shape is \[2, 5, 2\]; accepted: v's without its last axis"),
        ({"beta": ones(2, 5, 4, 1)}, r"beta.shape is \[2, 5, 4, 1\]; accepted: v's without its last axis"),
        ({"k": ones(2, 5, 2, 3).bfloat16()}, r"k.dtype is torch.bfloat16; accepted: q's dtype, torch.float32"),
        ({"v": ones(2, 5, 4, 6).double()}, r"v.dtype is torch.float64; accepted: q's dtype, torch.float32"),
        ({"q": ones(2, 5, 2, 3).int()}, r"q.dtype is torch.int32; accepted: bfloat16, float16, float32 or float64"),
        ({"g": -ones(2, 5, 4).long()}, r"g.dtype is torch.int64; accepted: bfloat16"),
        ({"beta": ones(2, 5, 4, device="meta")}, r"beta.device is meta; accepted: q's device, cpu"),
        ({"g": ones(2, 5, 4)}, r"max\(g\) is 1.0; accepted: g <= 0"),
        ({"initial_state": ones(2, 3, 6)}, r"initial_state.shape is \[2, 3, 6\]; accepted: .* \[2, 4, 3, 6\]"),
        ({"initial_state": ones(1, 4, 3, 6)}, r"initial_state.shape is \[1, 4, 3, 6\]; accepted: .* \[2, 4, 3, 6\]"),
        ({"initial_state": ones(2, 4, 6, 3)}, r"initial_state.shape is \[2, 4, 6, 3\]; accepted: .* \[2, 4, 3, 6\]"),
        ({"initial_state": ones(2, 4, 3, 6).half()}, r"initial_state.dtype is torch.float16; accepted: torch.float32"),
        ({"cu_seqlens": torch.tensor([0, 5])}, r"q.shape is \[2, 5, 2, 3\]; accepted: B = 1"),
    ],
)
def test_wrong_tensors(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        ([0, 5], "cu_seqlens is list; accepted: a tensor or None"),
        (torch.tensor([0.0, 5.0]), "cu_seqlens.dtype is torch.float32; accepted: int32 or int64"),
        (torch.tensor([[0, 5]]), r"cu_seqlens.shape is \[1, 2\]; accepted: \[N \+ 1\] with N >= 1"),
        (torch.tensor([0]), r"cu_seqlens.shape is \[1\]; accepted: \[N \+ 1\] with N >= 1"),
        (torch.tensor([1, 5]), r"cu_seqlens\[0\] is 1; accepted: 0"),
        (torch.tensor([0, 4]), r"cu_seqlens\[-1\] is 4; accepted: the number of tokens, 5"),
        (torch.tensor([0, 6]), r"cu_seqlens\[-1\] is 6; accepted: the number of tokens, 5"),
        (torch.tensor([0, 4, 2, 5]), r"cu_seqlens\[2\] is 2 after 4; accepted: offsets that never decrease"),
    ],
)
def test_cu_seqlens_that_do_not_fit(cu_seqlens, message):
    with pytest.raises(ValueError, match=message):
        packed(cu_seqlens)


def test_a_state_for_each_packed_sequence():
    with pytest.raises(ValueError, match=r"initial_state.shape is \[1, 4, 3, 6\]; accepted: .* \[2, 4, 3, 6\]"):
        packed(torch.tensor([0, 2, 5]), initial_state=ones(1, 4, 3, 6))


@pytest.mark.parametrize(
    ("q", "v", "message"),
    [
        (ones(1, 1, 1, 8).double(), ones(1, 1, 1, 8).double(), "q.dtype is torch.float64; accepted: .* Triton"),
        (ones(1, 1, 1, 257), ones(1, 1, 1, 8), r"q.shape is \[1, 1, 1, 257\]; accepted: K <= 256"),
        (ones(1, 1, 1, 8), ones(1, 1, 1, 513), r"v.shape is \[1, 1, 1, 513\]; accepted: V <= 512"),
    ],
)
def test_what_triton_does_not_take(q, v, message):
    with pytest.raises(ValueError, match=message):
        checks.check_triton(q, v)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": ones(2, 1, 2, 3)}, r"q is a tensor of shape \[2, 1, 2, 3\]; accepted: a tensor of shape \[B, H, K\]"),
        ({"v": ones(3, 4, 6)}, r"v.shape is \[3, 4, 6\]; accepted: the leading axes of q"),
        ({"state": ones(2, 4, 6, 3)}, r"state.shape is \[2, 4, 6, 3\]; accepted: .* \[2, 4, 3, 6\]"),
        ({"state": None}, "state is NoneType; accepted: a tensor"),
        ({"g": ones(2, 4)}, r"max\(g\) is 1.0; accepted: g <= 0"),
    ],
)
def test_decode_step(changes, message):
    right = {"q": ones(2, 2, 3), "k": ones(2, 2, 3), "v": ones(2, 4, 6), "g": -ones(2, 4), "beta": ones(2, 4)}
    right["state"] = ones(2, 4, 3, 6)
    gated_delta_rule_step(**right)
    with pytest.raises(ValueError, match=message):
        gated_delta_rule_step(**(right | changes))


class TestOnceOnCuda:
    """The memory that spares CUDA a wait per layer, driven on the CPU."""

    def test_checks_a_tensor_once_until_it_is_written_to(self, monkeypatch):
        calls = []
        monkeypatch.setattr(checks, "check_cu_seqlens", lambda x, time: calls.append(time))
        values, offsets = checks.ValueChecks(), torch.tensor([0, 5])
        values.once(offsets, 5)
        values.once(offsets, 5)
        assert calls == [5]
        offsets[1] = 6
        values.once(offsets, 6)
        values.once(offsets, 7)
        assert calls == [5, 6, 7]

    def test_checks_another_tensor_and_forgets_the_dead(self):
        values = checks.ValueChecks()
        offsets = torch.tensor([0, 5])
        values.once(offsets, 5)
        del offsets
        gc.collect()
        assert not values.seen
        with pytest.raises(ValueError, match="cu_seqlens"):
            values.once(torch.tensor([0, 4]), 5)
        assert not values.seen
