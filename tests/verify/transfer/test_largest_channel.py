"""The laws behind ``--assume largest-channel``, ``first-channel`` and ``carrying-channel``, run rather than derived,
and groups that obey."""

import math
from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import silu

from widthwise.codegen.parametrization import context
from widthwise.codegen.request import Request
from widthwise.derive import Builder, DeriveError, architecture, carrier, derive
from widthwise.derive.escape import first_away
from widthwise.derive.laws import NORMAL, ONES, TAPS, begins
from widthwise.derive.product import Applied, Factor, product
from widthwise.verify.transfer.train import generated

TYPICAL = "at-init"


@pytest.mark.parametrize("factors", [3, 4, 5])
def test_the_largest_of_n_products_gets_away_after_a_power_of_ln_n(factors: int) -> None:
    """dx_i/dt = Π_{j≠i} x_j for normal x, integrated: the first of N to reach infinity, in the median."""
    draws = torch.randn(200_000, factors, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    squares = draws.square().sort(dim=1).values  # all grow by the same y, dy/dt = ±2 sqrt(Π (x_i² + y))
    least, above = squares[:, 0], squares[:, 1:] - squares[:, :1]
    angle = (torch.arange(100, dtype=torch.float64) + 0.5) * (math.pi / 200)

    def time(start: torch.Tensor) -> torch.Tensor:  # with z = sqrt(least + y) = start + tan(angle)
        total = torch.zeros_like(start)
        for at in angle.tolist():
            z = start + math.tan(at)
            total += (math.pi / 200) / math.cos(at) ** 2 / (above + z.square()[:, None]).prod(dim=1).sqrt()
        return total

    whole = time(torch.zeros_like(least))
    rest = time(least.sqrt())
    away = torch.where(draws.prod(dim=1) > 0, rest, 2 * whole - rest).sort().values

    def first(channels: int) -> float:
        return float(away[int(len(away) * (1 - 0.5 ** (1 / channels)))])

    for more in (768, 3072):
        predicted = (math.log(more) / math.log(192)) ** (-(factors - 2) / 2)
        assert first(more) / first(192) == pytest.approx(predicted, rel=0.05)


def test_the_engine_follows_silu_as_torch_does() -> None:
    """silu(a·taps) silu(b) c, from plain draws and autograd: when the first of some channels is away, in the median."""
    a, b, c = (Factor(name, name, NORMAL) for name in "abc")
    tree = product(Applied("silu", product(a, Factor("t", "t", TAPS))), Applied("silu", product(b)), c)
    draws = 100_000
    x = torch.randn(draws, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x[:, 1] *= begins(TAPS)[1]

    def slope(x: torch.Tensor) -> torch.Tensor:
        at = x.detach().requires_grad_()
        value = silu(at[:, 0] * at[:, 1]) * silu(at[:, 2]) * at[:, 3]
        return torch.autograd.grad(value.sum(), at)[0]

    away, elapsed = [], torch.zeros(draws, dtype=torch.float64)
    for _ in range(150):
        length = 0.06 * (0.3 + x.norm(dim=1))
        half = slope(x)
        half *= (length / 2 / half.norm(dim=1))[:, None]
        ahead = slope(x + half)
        rate = length / ahead.norm(dim=1)
        x, elapsed = x + ahead * rate[:, None], elapsed + rate
        gone = x.norm(dim=1) > 200
        away.append(elapsed[gone])
        x, elapsed = x[~gone & (elapsed < 3)], elapsed[~gone & (elapsed < 3)]
    times = torch.cat(away).sort().values
    for several in (50, 200):
        measured = float(times[round(draws * (1 - 0.5 ** (1 / several)))])
        assert first_away(tree, several) == pytest.approx(measured, rel=0.04)


@pytest.mark.parametrize("assume", ["largest-channel", "first-channel"])
def test_groups_have_it_and_the_base_width_is_untouched(assume: str) -> None:
    sets = (TYPICAL, assume)
    rules = {name: generated(Request("gated_deltanet", "sgd", assume=name), "parametrization") for name in sets}
    table = derive(architecture("gated_deltanet"), "sgd", assume)
    (cls,) = (each for name, each in vars(generated(Request("gated_deltanet"), "model")).items() if name.endswith("LM"))
    base = {"width": 64, "depth": 1, "vocab": 17, "H": 6, "d_k": 8, "d_v": 16, "ffn": 176}
    for width in (64, 256):
        model = cls(**cls.widened(width, **base), device="meta")
        widths = {"width": width, "base_width": 64}
        for each in rules.values():
            each.set_multipliers(model, **widths)
        typical, largest = (
            {group["name"]: group for group in each.param_groups(model, lr=0.5, weight_decay=0.1, **widths)}
            for each in rules.values()
        )
        grown = width / 64
        for roles, channels, counted in (
            (("v_proj", "v_conv1d", "o_norm", "g_proj", "o_proj"), 96, 1.5),
            (("q_proj", "q_conv1d", "k_proj", "k_conv1d"), 48, 1.0),
            (("gate_proj", "up_proj", "down_proj"), 176, 0.5),
            (("embeddings", "attn_norm", "b_proj", "lm_head"), 2, 0.0),
        ):
            for role in roles:
                power = -float(table.rule(role).lr_log or 0)
                assert power == counted if assume == "largest-channel" or not counted else power > counted
                slower = (math.log(channels) / math.log(channels * grown)) ** power
                assert largest[role]["lr"] == pytest.approx(typical[role]["lr"] * slower, rel=1e-12)
                assert largest[role]["lr_mult"] == pytest.approx(largest[role]["lr"] / 0.5)
                assert largest[role]["weight_decay"] == pytest.approx(typical[role]["weight_decay"] / slower)
                if width == 64:
                    assert largest[role]["lr"] == typical[role]["lr"] == 0.5
        tuned = rules[assume].param_groups(model, lr=0.5, weight_decay=0.1, lr_multipliers={"v_proj": 0.25}, **widths)
        quicker = {group["name"]: group["lr"] / largest[group["name"]]["lr"] for group in tuned}
        assert quicker == {name: 0.25 if name == "v_proj" else 1.0 for name in largest}


def test_where_one_channel_carries_the_sum_curvature_grows_as_the_rule_says() -> None:
    """The flow of 1/N Σ f, all channels of a model together by autograd, until it has risen by one: rate times
    curvature along the gradient there, N Σ|∂f/∂x|², from 256 to 4096 channels (median of five models)."""
    a, b, c = (Factor(name, name, NORMAL) for name in "abc")
    output = product(Applied("silu", product(a, Factor("t", "t", TAPS))), Applied("silu", product(b)), c)
    mlp = product(Applied("silu", product(a)), b, c)

    def curvature(value: Callable[[torch.Tensor], torch.Tensor], scale: torch.Tensor, channels: int) -> float:
        found = []
        for seed in range(5):
            generator = torch.Generator().manual_seed(seed)
            x = torch.randn(channels, len(scale), dtype=torch.float64, generator=generator) * scale
            first = None
            while True:
                at = x.detach().requires_grad_()
                mean = value(at).mean()
                (slope,) = torch.autograd.grad(mean * channels, at)
                first = float(mean.detach()) if first is None else first
                left = first + 1 - float(mean.detach())
                if left < 0.01:
                    break
                step = min(
                    0.03 / float((slope.abs() / (x.abs() + 0.3)).max()),
                    0.3 * left / float(slope.square().mean(0).sum()),
                )
                x = x + step * slope
            found.append(float(slope.square().sum() / channels))
        return math.log(sorted(found)[2])

    grown = math.log(4096 / 256)
    for tree, value, begun in (
        (output, lambda x: silu(x[:, 0] * x[:, 1]) * silu(x[:, 2]) * x[:, 3], [1, begins(TAPS)[1], 1, 1]),
        (mlp, lambda x: silu(x[:, 0]) * x[:, 1] * x[:, 2], [1, 1, 1]),
    ):
        scale = torch.tensor(begun, dtype=torch.float64)
        slope = (curvature(value, scale, 4096) - curvature(value, scale, 256)) / grown
        assert slope == pytest.approx(-float(carrier.power(tree)), abs=0.1)


@pytest.mark.parametrize("scaling", ["heads-fixed", "head-dim-fixed"])
def test_groups_are_slowed_for_the_channel_that_carries(scaling: str) -> None:
    rules = generated(Request("gated_deltanet", "sgd", scaling=scaling, assume="carrying-channel"), "parametrization")
    (cls,) = (
        each
        for name, each in vars(generated(Request("gated_deltanet", scaling=scaling), "model")).items()
        if name.endswith("LM")
    )
    model = cls(**cls.widened(256, width=64, depth=1, vocab=17, H=6, d_k=8, d_v=16, ffn=176), device="meta")
    rules.set_multipliers(model, width=256, base_width=64)
    found = {group["name"]: group["lr"] for group in rules.param_groups(model, lr=1.0, width=256, base_width=64)}
    assert found["o_proj"] == pytest.approx(4 ** (-3 / 5 if scaling == "heads-fixed" else -1 / 2))
    keys = 4 ** (1 / 2) if scaling == "heads-fixed" else 4 * (math.log(48) / math.log(192)) ** (5 / 4)
    assert found["q_conv1d"] == pytest.approx(keys)
    assert found["up_proj"] == pytest.approx((math.log(176) / math.log(704)) ** (3 / 5))


@pytest.mark.parametrize("width", [64, 256])
@pytest.mark.parametrize(("packed", "fits"), [(("v_proj", "g_proj"), True), (("k_proj", "v_proj"), False)])
def test_rows_of_one_tensor_must_agree_at_the_base_width_already(
    packed: tuple[str, str], fits: bool, width: int
) -> None:
    rules = generated(Request("gated_deltanet", "sgd", assume="largest-channel"), "parametrization")
    (cls,) = (each for name, each in vars(generated(Request("gated_deltanet"), "model")).items() if name.endswith("LM"))
    model = cls(
        **cls.widened(width, width=64, depth=1, vocab=17, H=6, d_k=8, d_v=16, ffn=176), device=torch.device("meta")
    )
    attention = model.model.layers[0].attn
    parts = {name: getattr(attention, name).weight for name in packed}
    attention.packed = torch.nn.Parameter(torch.cat(list(parts.values())))
    for name in packed:
        delattr(attention, name)
    rows = {name: len(part) for name, part in parts.items()}
    widths = {"width": width, "base_width": 64}
    scaling = rules.SCALING.rename({"model.layers.0.attn.packed": rows})
    rules.set_multipliers(model, **widths, scaling=scaling)
    if fits:
        groups = {each["name"]: each for each in rules.param_groups(model, lr=1.0, **widths, scaling=scaling)}
        assert groups["v_proj+g_proj"]["lr"] == pytest.approx((math.log(96) / math.log(96 * width / 64)) ** 1.5)
    else:
        with pytest.raises(ValueError, match=r"need different groups \(k_proj, v_proj\)"):
            rules.param_groups(model, lr=1.0, **widths, scaling=scaling)


def test_channels_whose_number_no_parameter_tells_are_refused_when_code_is_made() -> None:
    g = Builder("untold")
    a, b, c, d = g.dim("a"), g.dim("b"), g.dim("c", 1), g.dim("d")
    x = g.linear(g.input("x", g.dim("features")), "first", g.dim("n", 1))
    one = g.product(g.reshape(g.linear(x, "one", a * b * c), a, b, c), g.parameter("gain", c, law=ONES), a, b, c)
    other = g.reshape(g.linear(x, "other", b * c * d), b, c, d)
    y = g.reshape(g.contract(one, other, a, b, d), a * b * d)
    g.cross_entropy(g.readout(y, "head", g.dim("classes")))
    graph = g.build()
    assert context(graph, derive(graph, "sgd"))["rules"]
    with pytest.raises(DeriveError, match=r"depends on the size of b\*c, which no parameter has"):
        context(graph, derive(graph, "sgd", "largest-channel"))
