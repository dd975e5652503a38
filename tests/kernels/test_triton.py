"""The Triton kernels against the float64 oracle, on a GPU; ``test_interpreter`` has those that need none."""

import pytest
import torch
from torch import Tensor

from widthwise.kernels import checks, chunked, triton_core, triton_launch, triton_scan
from widthwise.kernels.reference import gated_delta_rule_reference

NAMES = ("o", "final", "dq", "dk", "dv", "dg", "dbeta", "dinitial")
TOLERANCE = {torch.float32: 3e-3, torch.float16: 6e-3, torch.bfloat16: 6e-3}
PUBLISHED = [(24, 48), (32, 64), (96, 192), (192, 384), (256, 512), (128, 128)]


def draw(batch, length, heads, group, key_dim, value_dim, dtype, *, g=None, beta=None, cu=None, device="cuda", seed=0):
    """Fresh inputs, gates and betas drawn unless given, with what flows back to the two outputs."""
    torch.manual_seed(seed)
    value_heads = heads * group
    sequences = batch if cu is None else len(cu) - 1
    q, k = (torch.randn(batch, length, heads, key_dim, device=device).to(dtype) for _ in range(2))
    v, do = (torch.randn(batch, length, value_heads, value_dim, device=device).to(dtype) for _ in range(2))
    gates = -0.2 * torch.rand(batch, length, value_heads, device=device)
    betas = torch.rand(batch, length, value_heads, device=device)
    gates = gates if g is None else torch.full_like(gates, g)
    betas = betas if beta is None else torch.full_like(betas, beta)
    initial, dfinal = (torch.randn(sequences, value_heads, key_dim, value_dim, device=device) for _ in range(2))
    cu_seqlens = None if cu is None else torch.tensor(cu, device=device)
    return (q, k, v, gates, betas), initial, (do, dfinal), cu_seqlens


def ours(inputs, initial, grads, cu_seqlens, normalize=True):
    """Everything the kernels compute, in the order of NAMES."""
    rest = (inputs[0].shape[-1] ** -0.5, initial, cu_seqlens, normalize)
    o, final, saved = triton_scan.forward(*inputs, *rest)
    return o, final, *triton_scan.backward(*grads, *inputs, *rest, saved)


def few_made_many(batch, length, heads):
    """At least ``batch`` sequences, and so many that dg and dbeta in bf16 are what the kernels make of them."""
    return max(batch, -(-triton_scan.FEW // (length * heads)))


def oracle(inputs, initial, grads, cu_seqlens, normalize=True):
    """The same by autograd through the recurrence in float64."""
    leaves = [x.detach().double().requires_grad_() for x in (*inputs, initial)]
    o, final = gated_delta_rule_reference(
        *leaves[:5], initial_state=leaves[5], output_final_state=True, normalize_qk=normalize, cu_seqlens=cu_seqlens
    )
    loss = (o * grads[0].double()).sum() + (final * grads[1].double()).sum()
    return o.detach(), final.detach(), *torch.autograd.grad(loss, leaves)


def fast_oracle(inputs, initial, grads, cu_seqlens, normalize=True):
    """The same by the chunked path in float64, itself held to the recurrence in ``test_chunked``: for long inputs."""
    inputs = [x.double() for x in inputs]
    do, dfinal, initial = (None if x is None else x.double() for x in (*grads, initial))
    rest = (inputs[0].shape[-1] ** -0.5, initial, cu_seqlens, normalize)
    o, final, saved = chunked.forward(*inputs, *rest)
    return o, final, *chunked.backward(do, dfinal, *inputs, *rest, saved)


def errors(found: tuple[Tensor | None, ...], wanted: tuple[Tensor | None, ...]) -> dict[str, float]:
    """Relative L2 error of each result, however small it is; what is to be zero, or is in its type, must be zero. NaN
    counts as infinite."""
    out = {}
    for name, a, b in zip(NAMES, found, wanted, strict=True):
        if a is None and b is None:
            continue
        b = b.double() if b.to(a.dtype).any() else torch.zeros_like(a, dtype=torch.float64)
        error, norm = (a.double() - b).norm(), b.norm()
        error = error / norm if norm > 0 else torch.where(error > 0, torch.inf, 0.0)
        out[name] = float(error) if torch.isfinite(error) else float("inf")
    return out


def worst(case, normalize=True, reference=oracle) -> float:
    found = ours(*case, normalize)
    return max(errors(found, reference(*case, normalize)).values())


def forward_alone(case, normalize=True):
    """Outputs where no gradient is wanted: nothing is kept, and in bf16 u has one part."""
    inputs, initial, _, cu_seqlens = case
    return triton_scan.forward(*inputs, inputs[0].shape[-1] ** -0.5, initial, cu_seqlens, normalize, keep=False)


def unkept_is_the_same(case) -> bool:
    """Whether gradients have the same bits when nothing was kept for the backward pass."""
    inputs, initial, grads, cu_seqlens = case
    rest = (inputs[0].shape[-1] ** -0.5, initial, cu_seqlens, True)
    found = triton_scan.backward(*grads, *inputs, *rest, forward_alone(case)[2])
    return all(torch.equal(a, b) for a, b in zip(found, ours(*case)[2:], strict=True))


def repeated_keys(batch, seed):
    """A hundred times the same key, and rows of zeros."""
    case = draw(batch, 200, 1, 1, 128, 128, torch.bfloat16, seed=seed)
    k = torch.nn.functional.normalize(case[0][1].float(), dim=-1)
    k[:, 50:150] = k[:, 50:51]
    k[:, 20] = 0.0
    case[0][1].copy_(k)
    case[0][0][:, 30] = 0.0
    return case


@pytest.mark.parametrize("length", [1, 32, 40])
def test_few_numbers_in_fp32(length):
    """dg and dbeta by the chunked path, its last chunk filled up."""
    case = draw(2, length, 2, 2, 24, 48, torch.bfloat16, device="cpu")
    inputs, initial, (do, dfinal), _ = case
    found = triton_scan._in_fp32(do, dfinal, *inputs, 24**-0.5, initial, True)
    for a, b in zip(found, oracle(*case)[5:7], strict=True):
        assert (a - b).norm() < 1e-5 * b.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("key_dim", "value_dim"), PUBLISHED)
@pytest.mark.parametrize("length", [1, 2, 15, 63, 64, 65, 200])
def test_shapes(key_dim, value_dim, length, dtype):
    assert worst(draw(2, length, 2, 1, key_dim, value_dim, dtype), reference=fast_oracle) < TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("key_dim", "value_dim"), PUBLISHED)
@pytest.mark.parametrize("length", [1, 2])
def test_many_short_sequences(key_dim, value_dim, length, dtype):
    """Where dg and dbeta are more than four inner products, some of them near zero by chance."""
    assert worst(draw(32, length, 2, 1, key_dim, value_dim, dtype), reference=fast_oracle) < TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize(("key_dim", "value_dim"), PUBLISHED)
@pytest.mark.parametrize("length", [1, 2, 15, 63, 64, 65, 200])
def test_many_numbers(key_dim, value_dim, length):
    """dg and dbeta in bf16, by the kernels."""
    case = draw(few_made_many(2, length, 2), length, 2, 1, key_dim, value_dim, torch.bfloat16)
    assert worst(case, reference=fast_oracle) < TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("length", [1, 2, 15])
def test_few_numbers(length, seed):
    """Any draw of them: two sequences of few tokens."""
    case = draw(2, length, 2, 1, 192, 384, torch.bfloat16, seed=seed)
    assert worst(case, reference=fast_oracle) < TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("key_dim", "value_dim"), PUBLISHED)
@pytest.mark.parametrize(("length", "group", "packed"), [(700, 1, False), (300, 2, False), (700, 2, True)])
@pytest.mark.parametrize("from_state", [False, True])
def test_without_states(key_dim, value_dim, length, group, packed, from_state, dtype):
    """Nothing flows back from a final state, nor is there one at the beginning, as in training, or only there."""
    cu = [0, 1, 300, length] if packed else None
    inputs, initial, (do, _), cu_seqlens = draw(1 if packed else 2, length, 2, group, key_dim, value_dim, dtype, cu=cu)
    case = (inputs, initial if from_state else None, (do, None), cu_seqlens)
    assert max(errors(ours(*case), fast_oracle(*case)).values()) < TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("length", [64, 65])
def test_recurrence(length, dtype):
    assert worst(draw(1, length, 2, 2, 128, 128, dtype)) < TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("length", [1000, 2048])
@pytest.mark.parametrize("group", [1, 2, 4])
def test_long(length, group, dtype):
    assert worst(draw(1, length, 2, group, 128, 128, dtype), reference=fast_oracle) < TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("g", [0.0, -1e-4, -5.0, -50.0, -1e4])
@pytest.mark.parametrize("beta", [0.0, 1.0, None])
@pytest.mark.parametrize("batch", [1, few_made_many(1, 200, 2)])
def test_gates(batch, g, beta, dtype):
    case = draw(batch, 200, 2, 1, 128, 128, dtype, g=g, beta=beta)
    assert worst(case, reference=fast_oracle) < TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("key_dim", "value_dim"), [(32, 64), (128, 128), (192, 384)])
def test_sequences(key_dim, value_dim, dtype):
    case = draw(1, 400, 2, 2, key_dim, value_dim, dtype, cu=[0, 0, 1, 64, 65, 65, 200, 400, 400])
    assert worst(case, reference=fast_oracle) < TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("batch", "seed"), [*((1, seed) for seed in range(10)), (few_made_many(1, 200, 1), 0)])
def test_repeated_keys_and_zero_rows(batch, seed, normalize):
    assert worst(repeated_keys(batch, seed), normalize, fast_oracle) < TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_rows_without_a_norm(dtype):
    """q and k zero or next to zero at the same token, whose reciprocal norm times a value leaves fp16's range."""
    (q, k, v, g, beta), initial, grads, _ = draw(1, 200, 2, 1, 128, 128, dtype)
    for x in (q, k):
        x[:, 20] = 0.0
        x[:, 30] *= 1e-5
    v[:, 20:40] *= 200.0
    for x in grads:
        x *= 1e-3
    assert worst(((q, k, v, g, beta), initial, grads, None), reference=fast_oracle) < TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("key_dim", "offset"), [(128, 0), (128, 3), (20, 0)])
def test_layouts(key_dim, offset, dtype):
    """q, k and v cut from one projection: where the copy engine can read them, and where it cannot."""
    case = draw(2, 150, 4, 1, key_dim, key_dim, dtype)
    packed = torch.randn(2, 150, 4, 3 * key_dim + 8, device="cuda").to(dtype)
    cut = tuple(packed[..., offset + n * key_dim : offset + (n + 1) * key_dim] for n in range(3))
    assert worst(((*cut, *case[0][3:]), *case[1:]), reference=fast_oracle) < TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("key_dim", "value_dim"), [(20, 20), (33, 77), (130, 24), (24, 48)])
def test_odd_widths(key_dim, value_dim, packed, dtype):
    """Widths that are no multiples of 8 or of a block, by the copy engine and without it."""
    shape = (1, 300) if packed else (2, 150)
    case = draw(*shape, 3, 2, key_dim, value_dim, dtype, cu=[0, 1, 65, 65, 300] if packed else None)
    assert worst(case, reference=fast_oracle) < TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("g", [-1e-3, -1e-4])
def test_slow_gates(g, dtype):
    """Long sequences of small states, each walked in one go: what rounding adds to a state stays for long."""
    assert worst(draw(16, 2048, 4, 1, 32, 32, dtype, g=g), reference=fast_oracle) < TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("key_dim", "value_dim"), [(64, 192), (128, 256), (136, 136), (192, 384), (256, 192)])
def test_values_in_several_blocks(key_dim, value_dim, packed, dtype):
    """The gradients in one pass over V and in two, by the copy engine and without it; the same bits each time."""
    shape = (1, 300) if packed else (2, 150)
    case = draw(*shape, 2, 2, key_dim, value_dim, dtype, cu=[0, 1, 65, 65, 300] if packed else None)
    assert worst(case, reference=fast_oracle) < TOLERANCE[dtype]
    assert all(torch.equal(a, b) for a, b in zip(ours(*case), ours(*case), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_keeping_changes_no_gradient(dtype):
    assert unkept_is_the_same(draw(2, 150, 2, 2, 128, 128, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("key_dim", "value_dim"), PUBLISHED)
@pytest.mark.parametrize("length", [1, 64, 200, 2048])
@pytest.mark.parametrize("g", [None, -1e-4, -50.0])
def test_no_gradient_wanted(g, length, key_dim, value_dim, dtype):
    case = draw(2, length, 2, 2, key_dim, value_dim, dtype, g=g)
    found = errors((*forward_alone(case)[:2], *[None] * 6), (*fast_oracle(*case)[:2], *[None] * 6))
    assert max(found.values()) < TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(5))
def test_no_gradient_of_repeated_keys_wanted(seed):
    case = repeated_keys(1, seed)
    found = errors((*forward_alone(case)[:2], *[None] * 6), (*fast_oracle(*case)[:2], *[None] * 6))
    assert max(found.values()) < TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("batch", "length", "width"), [(1, 2048, 128), (2, 3001, 64), (1, 4096, 32)])
def test_segments(batch, length, width, dtype):
    """Sequences walked in several places at once."""
    case = draw(batch, length, 2, 2, width, width, dtype, g=-1e-3)
    segments, _ = triton_launch.segments_of(
        triton_launch.lay_out(case[0][0], None), 4, width, width, triton_launch.chip_of(case[1])
    )
    assert segments > 2
    assert worst(case, reference=fast_oracle) < TOLERANCE[dtype]
    assert all(torch.equal(a, b) for a, b in zip(ours(*case), ours(*case), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("magnitude", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("balanced", [True, False])
def test_fp32_of_any_magnitude(magnitude, normalize, balanced):
    """``balanced``: what flows back through raw q is as large as what flows back from the final state."""
    (q, k, v, g, beta), initial, (do, dfinal), _ = draw(2, 200, 2, 2, 128, 128, torch.float32)
    if not normalize:
        q, k = q * magnitude, torch.nn.functional.normalize(k, dim=-1)
        do = do / magnitude if balanced else do
    case = ((q, k, v * magnitude, g, beta), initial * magnitude, (do * 1e-6, dfinal * 1e-6), None)
    assert worst(case, normalize, fast_oracle) < TOLERANCE[torch.float32]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("key_dim", "value_dim"), PUBLISHED)
def test_same_bits_and_split(key_dim, value_dim, dtype):
    (q, k, v, g, beta), initial, grads, _ = draw(1, 300, 2, 1, key_dim, value_dim, dtype)
    case = ((q, k, v, g, beta), initial, grads, None)
    once, again = ours(*case), ours(*case)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    rest = (key_dim**-0.5, None, True)
    o, middle, _ = triton_scan.forward(*(x[:, :128] for x in case[0]), rest[0], initial, *rest[1:])
    more, end, _ = triton_scan.forward(*(x[:, 128:] for x in case[0]), rest[0], middle, *rest[1:])
    assert torch.equal(end, once[1])
    # fp32 is rounded against the largest value of a call, below 2^-16 of that.
    torch.testing.assert_close(torch.cat((o, more), 1), once[0], rtol=0, atol=1e-6 if dtype == torch.float32 else 0)


@pytest.mark.gpu
def test_nothing_is_compiled_for_a_new_batch():
    """The compiled variants are counted in Triton's own caches."""
    kernels = [x for x in vars(triton_core).values() if hasattr(x, "device_caches")]

    def variants() -> int:
        return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())

    ours(*draw(2, 100, 4, 1, 64, 64, torch.bfloat16))
    before = variants()
    for batch, length in ((1, 1), (1, 128), (3, 77), (2, 1024), (40, 100)):
        ours(*draw(batch, length, 4, 1, 64, 64, torch.bfloat16))
    assert variants() == before
    # A sequence that is walked in several places brings the kernels that join them, once.
    ours(*draw(1, 2048, 4, 1, 64, 64, torch.bfloat16))
    before = variants()
    for batch, length in ((1, 3000), (2, 5000)):
        ours(*draw(batch, length, 4, 1, 64, 64, torch.bfloat16))
    assert variants() == before
    ours(*draw(1, 300, 4, 1, 64, 64, torch.bfloat16, cu=[0, 100, 300]))
    before = variants()
    ours(*draw(1, 640, 4, 1, 64, 64, torch.bfloat16, cu=[0, 1, 1, 16, 640]))
    assert variants() == before


def choices() -> list[tuple[int, int]]:
    """The widest K, V of every set of blocks that can be chosen on a Hopper chip."""
    chip, widest = triton_launch.Chip(132, True), {}
    for key_dim in range(8, checks.TRITON_MAX_KEY + 1, 8):
        for value_dim in range(8, checks.TRITON_MAX_VALUE + 1, 8):
            wide = triton_launch.is_wide(key_dim, value_dim, chip)
            blocks = (
                triton_launch.prepare_blocks(key_dim),
                triton_launch.sweep_blocks(key_dim, value_dim, chip),
                triton_launch.wide_gradient_blocks(key_dim, chip) if wide else {},
                {} if wide else triton_launch.gradient_blocks(key_dim, value_dim, chip),
            )
            widest[str(blocks)] = key_dim, value_dim
    return list(widest.values())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("key_dim", "value_dim"), choices())
def test_every_choice_of_blocks(key_dim, value_dim, dtype):
    case = draw(4, 150, 2, 1, key_dim, value_dim, dtype)
    assert worst(case, reference=fast_oracle) < TOLERANCE[dtype]
