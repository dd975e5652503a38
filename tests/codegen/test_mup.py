"""Beside mup 1.0.0 (``pip install --no-deps mup``), used as its README says: the same numbers in the same gauge."""

import warnings
from collections.abc import Callable
from types import ModuleType

import pytest

torch = pytest.importorskip("torch")
from small_models import MLP, Transformer  # noqa: E402
from torch import nn  # noqa: E402

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    mup = pytest.importorskip("mup", reason="mup is not installed (pip install --no-deps mup==1.0.0)")

BASE, DELTA = 32, 48
SCORES = {MLP: {}, Transformer: {"attn_scale": 1.0}}  # a base value that the width does not tell
READOUTS = {MLP: ("output", "output"), Transformer: ("lm_head", "lm_head")}
NAMES = {MLP: "mlp", Transformer: "transformer"}


def theirs(make: type[nn.Module], width: int) -> nn.Module:
    """The model with mup's readout in place of the last layer, and its base shapes set."""

    def model(size: int) -> nn.Module:
        made = make(size)
        name, _ = READOUTS[make]
        last = getattr(made, name)
        setattr(made, name, mup.MuReadout(last.in_features, last.out_features, bias=False))
        return made

    return mup.set_base_shapes(model(width), model(BASE), delta=model(DELTA))


@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("make", [MLP, Transformer])
class TestSameAsMup:
    @pytest.mark.parametrize("optimizer", ["adam", "sgd"])
    def test_learning_rates(
        self, generated: Callable[..., ModuleType], make: type[nn.Module], width: int, optimizer: str
    ) -> None:
        module = generated(NAMES[make], optimizer=optimizer, preset="tensor-programs-v")
        model = make(width)
        module.set_multipliers(model, width=width, base_width=BASE, base_multipliers=SCORES[make])
        ours = {
            parameter: group["lr"]
            for group in module.param_groups(model, lr=0.1, width=width, base_width=BASE)
            for parameter in group["params"]
        }
        other = theirs(make, width)
        scaled = {"adam": mup.MuAdam, "sgd": mup.MuSGD}[optimizer](other.parameters(), lr=0.1)
        rates = {parameter: group["lr"] for group in scaled.param_groups for parameter in group["params"]}
        expected = {name: rates[parameter] for name, parameter in other.named_parameters()}
        assert {name: ours[parameter] for name, parameter in model.named_parameters()} == pytest.approx(expected)

    def test_multipliers(self, generated: Callable[..., ModuleType], make: type[nn.Module], width: int) -> None:
        module = generated(NAMES[make], preset="tensor-programs-v")
        name, role = READOUTS[make]
        ours = module.multipliers(width=width, base_width=BASE, base_multipliers=SCORES[make])
        readout = getattr(theirs(make, width), name)
        assert ours[role] == readout.output_mult / readout.width_mult()
        if make is Transformer:  # mup's README: scores of q·k / d, where one had q·k / √d
            assert ours["attn_scale"] == BASE / width

    def test_initial_standard_deviations(
        self, generated: Callable[..., ModuleType], make: type[nn.Module], width: int
    ) -> None:
        torch.manual_seed(0)
        other = dict(theirs(make, width).named_parameters())
        module, model = generated(NAMES[make], preset="tensor-programs-v"), make(width)
        base = {name.split(".")[-2]: p.shape[-1] for name, p in make(BASE).named_parameters() if p.dim() == 2}
        stds = {role: (3 * fan_in) ** -0.5 for role, fan_in in base.items() if role != "embeddings"}
        scaling = module.SCALING.rename({}, stds=stds)  # nn.Linear's own: uniform in ±fan_in^(-1/2)
        module.init_(model, width=width, base_width=BASE, scaling=scaling, base_multipliers=SCORES[make])
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                sampling = 3 * (0.5 / parameter.numel()) ** 0.5 * 2**0.5
                assert parameter.std().item() == pytest.approx(other[name].std().item(), rel=sampling), name
