"""The emitted init_, param_groups and set_multipliers, on models as users have them."""

import copy
import math
from collections.abc import Callable
from types import ModuleType

import pytest

torch = pytest.importorskip("torch")
from small_models import MLP, Transformer  # noqa: E402
from torch import nn  # noqa: E402

from widthwise.codegen.request import Request  # noqa: E402

Generated = Callable[..., ModuleType]
WIDE = {"width": 64, "base_width": 16}
AT_BASE = {"width": 16, "base_width": 16}


def ready(module: ModuleType) -> nn.Module:
    """A wide model whose multipliers are set."""
    model = MLP(64)
    module.set_multipliers(model, **WIDE)
    return model


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5) -> list[float]:
    """Losses over a few steps on fixed data of the model's own dtype."""
    first = next(model.parameters())
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 6, generator=generator, dtype=first.dtype)
    y = torch.randint(0, 5, (32,), generator=generator)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


class TestGroups:
    @pytest.mark.parametrize("optimizer", ["adamw", "sgd", "adam", "lion", "muon", "adafactor"])
    @pytest.mark.parametrize("gauge", ["multiplier", "absorbed"])
    def test_are_the_rules(self, generated: Generated, optimizer: str, gauge: str) -> None:
        table = Request("mlp", optimizer=optimizer, gauge=gauge).table()
        module = generated("mlp", optimizer=optimizer, gauge=gauge)
        groups = {each["name"]: each for each in module.param_groups(ready(module), lr=0.1, weight_decay=0.2, **WIDE)}
        assert set(groups) == {rule.role for rule in table.rules if rule.parameters}
        for role, group in groups.items():
            factors = table.rule(role).factors(64, 16)
            assert group["lr"] == 0.1 * factors["lr"]
            assert group["lr_mult"] == factors["lr"]
            assert group["weight_decay"] == 0.2 * factors["weight_decay"]
            assert group.get("eps") == (1e-8 * factors["eps"] if "eps" in factors else None)

    def test_hold_every_parameter_once(self, generated: Generated) -> None:
        model = ready(generated("mlp"))
        groups = generated("mlp").param_groups(model, lr=0.1, **WIDE)
        held = [parameter for group in groups for parameter in group["params"]]
        assert len(held) == len(set(held)) == len(list(model.parameters()))

    def test_change_nothing_at_the_base_width(self, generated: Generated) -> None:
        module, ours, plain = generated("mlp"), MLP(16).double(), MLP(16).double()
        module.init_(ours, seed=3, **AT_BASE)
        plain.load_state_dict(ours.state_dict())
        knobs = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-6}
        trained(ours, torch.optim.AdamW(module.param_groups(ours, **knobs, **AT_BASE)))
        trained(plain, torch.optim.AdamW(plain.parameters(), **knobs))
        assert same(values(ours), values(plain))

    def test_take_roles_without_decay(self, generated: Generated) -> None:
        module = generated("mlp")
        groups = module.param_groups(ready(module), lr=0.1, weight_decay=0.1, no_decay=["input_bias"], **WIDE)
        assert [each["name"] for each in groups if each["weight_decay"] == 0] == ["input_bias"]
        with pytest.raises(ValueError, match=r"no_decay names roles that there are not: bias \(there are input, "):
            module.param_groups(ready(module), lr=0.1, no_decay=["bias"], **WIDE)

    def test_take_multipliers_of_learning_rates_by_role(self, generated: Generated) -> None:
        module = generated("mlp")
        plain, tuned = (
            {
                each["name"]: each
                for each in module.param_groups(ready(module), lr=0.1, weight_decay=0.1, **more, **WIDE)
            }
            for more in ({}, {"lr_multipliers": {"input_bias": 0.25}})
        )
        assert all(each["lr"] == 0.1 * each["lr_mult"] for each in tuned.values())
        told = {name: (each["lr"] / plain[name]["lr"], each["weight_decay"]) for name, each in tuned.items()}
        assert told == {
            name: (0.25 if name == "input_bias" else 1.0, each["weight_decay"]) for name, each in plain.items()
        }
        with pytest.raises(
            ValueError, match=r"lr_multipliers names roles that there are not: bias \(there are input, "
        ):
            module.param_groups(ready(module), lr=0.1, lr_multipliers={"bias": 2.0}, **WIDE)
        for wrong in (0, -1.0, math.inf, math.nan):
            with pytest.raises(ValueError, match="lr_multipliers must be positive numbers: input_bias"):
                module.param_groups(ready(module), lr=0.1, lr_multipliers={"input_bias": wrong}, **WIDE)

    def test_leave_frozen_parameters_out(self, generated: Generated) -> None:
        model = ready(generated("mlp"))
        model.input.weight.requires_grad_(False)
        model.adapter = nn.Parameter(torch.zeros(3), requires_grad=False)  # frozen and unknown: nobody's business
        groups = generated("mlp").param_groups(model, lr=0.1, **WIDE)
        assert "input" not in [each["name"] for each in groups]

    @pytest.mark.parametrize("wrap", [torch.compile, copy.deepcopy, lambda model: nn.ModuleDict({"module": model})])
    def test_of_wrapped_models_are_the_same(self, generated: Generated, wrap: Callable) -> None:
        module = generated("mlp")
        model = ready(module)
        groups = module.param_groups(wrap(model), lr=0.1, **WIDE)
        expected = module.param_groups(model, lr=0.1, **WIDE)
        assert [(each["name"], each["lr"]) for each in groups] == [(each["name"], each["lr"]) for each in expected]

    def test_survive_the_optimizers_state_dict(self, generated: Generated) -> None:
        module = generated("mlp")
        model = ready(module)
        optimizer = torch.optim.AdamW(module.param_groups(model, lr=0.1, **WIDE))
        trained(model, optimizer, 1)
        again = torch.optim.AdamW(module.param_groups(copy.deepcopy(model), lr=0.5, **WIDE))
        again.load_state_dict(optimizer.state_dict())
        assert [each["lr_mult"] for each in again.param_groups] == [each["lr_mult"] for each in optimizer.param_groups]


class TestErrors:
    """Nothing unmatched, ever."""

    def refused(self, generated: Generated, model: nn.Module, match: str, width: int = 64) -> None:
        before = values(model)
        for call in (
            lambda: generated("mlp").init_(model, width=width, base_width=16),
            lambda: generated("mlp").param_groups(model, lr=0.1, width=width, base_width=16),
        ):
            with pytest.raises(ValueError, match=match):
                call()
        assert same(values(model), before)

    def test_a_parameter_without_a_rule(self, generated: Generated) -> None:
        model = MLP(64)
        model.extra = nn.Linear(3, 4)
        self.refused(generated, model, r"no rule names extra.weight \[4, 3\]\n.*no rule names extra.bias")

    def test_a_rule_without_a_parameter(self, generated: Generated) -> None:
        self.refused(generated, MLP(64, depth=0), r"rule hidden names no parameter \(layers.\*.hidden.weight\)")

    def test_a_glob_without_a_parameter(self, generated: Generated) -> None:
        module = generated("mlp")
        scaling = module.SCALING.rename({"layers.*.hidden.weight": "hidden", "layer.*.hidden.weight": "hidden"})
        with pytest.raises(ValueError, match=r"rule hidden names no parameter \(layer.\*.hidden.weight\)"):
            module.init_(MLP(64), scaling=scaling, **WIDE)

    def test_a_rule_beside_rows(self, generated: Generated) -> None:
        module = generated("mlp")
        beside = module.replace(module.RULES[2], role="other")
        scaling = module.replace(module.SCALING, rules=(*module.RULES, beside)).rename(
            {"layers.*.hidden.weight": {"hidden": 64}}
        )
        with pytest.raises(ValueError, match="hidden, other do not make up 64 rows"):
            module.init_(MLP(64), scaling=scaling, **WIDE)

    def test_a_width_that_is_not_the_models(self, generated: Generated) -> None:
        self.refused(generated, MLP(64), r"axis n has 64 entries, and 32 elsewhere", width=32)

    def test_a_shape_that_contradicts_the_others(self, generated: Generated) -> None:
        model = MLP(64)
        model.layers[1].hidden = nn.Linear(64, 48)
        self.refused(generated, model, r"layers.1.hidden.weight: axis n has 48 entries, and 64 elsewhere")

    def test_a_shape_of_another_rank(self, generated: Generated) -> None:
        model = MLP(64)
        model.output.weight = nn.Parameter(torch.zeros(5, 64, 2))
        self.refused(generated, model, r"output.weight \[5, 64, 2\] should be \[classes, n\]")

    def test_a_tie_that_the_rules_do_not_have(self, generated: Generated) -> None:
        model = MLP(64)
        model.layers[1].hidden.bias = model.input.bias
        self.refused(generated, model, "input.bias = layers.1.hidden.bias .* has 2 rules.*generate with --tied")

    def test_widths_that_are_none(self, generated: Generated) -> None:
        self.refused(generated, MLP(64), "must be positive, not 0 and 16", width=0)

    def test_a_multiplier_that_was_never_set(self, generated: Generated) -> None:
        model = MLP(64)
        with pytest.raises(
            ValueError, match=r"multiplier output_multiplier is 1, not 0\.25: call init_ or set_multipliers"
        ):
            generated("mlp").param_groups(model, lr=0.1, **WIDE)
        generated("mlp").param_groups(model, lr=0.1, width=64, base_width=64)

    def test_a_multiplier_without_a_place(self, generated: Generated) -> None:
        model = MLP(64)
        del model.output_multiplier
        before = values(model)
        with pytest.raises(ValueError, match=r"multiplier output .* has no place: no attribute output_multiplier"):
            generated("mlp").init_(model, **WIDE)
        assert same(values(model), before)
        generated("mlp", gauge="absorbed").init_(model, **WIDE)  # which needs none


class TestParts:
    def test_a_star_is_one_part_of_a_name(self, generated: Generated) -> None:
        matches = generated("mlp")._matches
        assert matches("layers.*.hidden.weight", "layers.11.hidden.weight")
        assert not matches("layers.*.hidden.weight", "layers.1.inner.hidden.weight")
        assert not matches("layers.*.hidden.weight", "layersx1.hidden.weight")

    def test_every_axis_of_the_fan_in_shrinks_to_the_base(
        self, generated: Generated, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        module = generated("mlp")
        monkeypatch.setitem(module.AXES, "H", 0.5)
        monkeypatch.setitem(module.AXES, "K", 0.5)
        rule = module.replace(module.RULES[2], shape="n, H*K")
        assert module._fan_in(rule, (64, 64), 0.25) == 16
        assert module._fan_in(module.replace(rule, shape="n, H"), (64, 64), 0.25) == 32


class TestBaseMultipliers:
    def test_one_that_the_width_does_not_tell_must_be_given(self, generated: Generated) -> None:
        module, model = generated("transformer"), Transformer(64)
        with pytest.raises(ValueError, match=r"attn_scale is d_head\^\(-1/2\) at the base width, as a rule: give"):
            module.init_(model, **WIDE)
        module.init_(model, base_multipliers={"attn_scale": 8**-0.5}, **WIDE)
        assert model.model.layers[1].attn.attn_scale == 8**-0.5 / 4
        module.param_groups(model, lr=1.0, **WIDE)

    def test_that_of_a_tied_readout_follows_from_the_width(self, generated: Generated) -> None:
        assert generated("gated_deltanet", tied=True).multipliers(**WIDE)["lm_head"] == 16**-0.5 / 4

    def test_are_what_groups_are_held_against(self, generated: Generated) -> None:
        module, model = generated("mlp"), MLP(64)
        given = {"output": 4.0}
        module.init_(model, base_multipliers=given, **WIDE)
        assert model.output_multiplier == 1  # as a model that was never touched has
        module.param_groups(model, lr=0.1, base_multipliers=given, **WIDE)
        with pytest.raises(ValueError, match=r"output_multiplier is 1, not 0\.25"):
            module.param_groups(model, lr=0.1, **WIDE)
        module.init_(model, width=64, base_width=32)
        with pytest.raises(ValueError, match=r"output_multiplier is 0\.5, not 0\.25"):
            module.param_groups(model, lr=0.1, **WIDE)

    def test_live_where_the_model_has_them(self, generated: Generated) -> None:
        module, model = generated("mlp"), MLP(64)
        del model.output_multiplier
        model.layers[0].scale = 1  # an int is a number, too
        scaling = module.SCALING.rename({}, multipliers={"output": "layers.0.scale"})
        module.init_(model, scaling=scaling, **WIDE)
        assert model.layers[0].scale == 0.25
        with pytest.raises(ValueError, match="there are no roles hidden"):
            module.SCALING.rename({}, multipliers={"hidden": "layers.0.scale"})

    def test_others_are_refused(self, generated: Generated) -> None:
        with pytest.raises(ValueError, match="there are no multipliers outputs"):
            generated("mlp").multipliers(base_multipliers={"outputs": 2.0}, **WIDE)
        assert generated("mlp").multipliers(base_multipliers={"output": 2.0}, **WIDE) == {"output": 0.5}


class TestInit:
    def test_draws_by_the_rules(self, generated: Generated) -> None:
        module, model = generated("mlp"), MLP(256)
        report = {each.name: each for each in module.init_(model, width=256, base_width=16)}
        assert report.keys() == dict(model.named_parameters()).keys()
        # base std 16^(-1/2), times (256/16)^(-1/2); and a readout at its base std
        assert model.layers[0].hidden.weight.std().item() == pytest.approx(1 / 16, rel=0.02)
        assert model.output.weight.std().item() == pytest.approx(1 / 4, rel=0.1)
        assert not model.input.bias.any()
        for name, parameter in model.named_parameters():
            assert report[name].rms == pytest.approx(parameter.detach().square().mean().sqrt().item(), rel=1e-5)
        assert model.output_multiplier == 1 / 16

    def test_is_repeatable_and_idempotent(self, generated: Generated) -> None:
        module, a, b = generated("mlp"), MLP(64), MLP(64)
        module.init_(a, seed=1, **WIDE)
        module.init_(b, seed=2, **WIDE)
        assert not same(values(a), values(b))
        for _ in range(2):
            module.init_(b, seed=1, **WIDE)
            assert same(values(a), values(b))
            assert b.output_multiplier == 0.25

    def test_takes_a_generator(self, generated: Generated) -> None:
        module, a, b = generated("mlp"), MLP(64), MLP(64)
        generator = torch.Generator().manual_seed(5)
        module.init_(a, seed=generator, **WIDE)
        module.init_(b, seed=generator, **WIDE)
        assert not same(values(a), values(b))
        module.init_(b, seed=torch.Generator().manual_seed(5), **WIDE)
        assert same(values(a), values(b))

    def test_layers_are_drawn_apart(self, generated: Generated) -> None:
        model = MLP(64)
        generated("mlp").init_(model, **WIDE)
        assert not torch.equal(model.layers[0].hidden.weight, model.layers[1].hidden.weight)

    def test_draws_in_float32_whatever_the_dtype(self, generated: Generated) -> None:
        exact, rounded = MLP(64).double(), MLP(64).bfloat16()
        generated("mlp").init_(exact, **WIDE)
        generated("mlp").init_(rounded, **WIDE)
        expected = {name: value.bfloat16() for name, value in values(exact).items()}
        assert same(values(rounded), expected)

    def test_fills_the_meta_device(self, generated: Generated) -> None:
        with torch.device("meta"):
            model = MLP(64)
        model.layers[1].hidden.weight = model.layers[0].hidden.weight
        generated("mlp").init_(model, **WIDE)
        assert model.layers[1].hidden.weight is model.layers[0].hidden.weight
        real = MLP(64)
        real.layers[1].hidden.weight = real.layers[0].hidden.weight
        generated("mlp").init_(real, **WIDE)
        assert same(values(model), values(real))

    def test_does_not_guess_buffers_on_the_meta_device(self, generated: Generated) -> None:
        with torch.device("meta"):
            model = MLP(64)
            model.register_buffer("frequencies", torch.zeros(3))
        with pytest.raises(ValueError, match="only their model can fill them: frequencies"):
            generated("mlp").init_(model, **WIDE)

    def test_touches_nothing_by_itself(self, generated: Generated) -> None:
        module, model = generated("mlp"), MLP(64)
        before = values(model)
        module.set_multipliers(model, **WIDE)
        module.param_groups(model, lr=0.1, **WIDE)
        assert same(values(model), before)
        assert not any(vars(parameter) for parameter in model.parameters())  # nothing patched onto tensors

    def test_takes_other_standard_deviations(self, generated: Generated) -> None:
        module, model = generated("mlp"), MLP(256)
        scaling = module.SCALING.rename({}, stds={"hidden": 0.02, "output": 0.0})
        module.init_(model, width=256, base_width=16, scaling=scaling)
        assert model.layers[0].hidden.weight.std().item() == pytest.approx(0.02 / 4, rel=0.02)
        assert not model.output.weight.any()

    @pytest.mark.parametrize("law", ["normal", "unit_normal", "taps"])
    def test_every_symmetric_law_takes_one(self, generated: Generated, law: str) -> None:
        drawn = generated("mlp")._draw("w", law, (300, 300), 0, fan_in=9.0, std=0.3)
        assert drawn.std().item() == pytest.approx(0.3, rel=0.02)
        assert drawn.mean().item() == pytest.approx(0, abs=0.01)

    @pytest.mark.parametrize(
        ("renaming", "says"),
        [
            ({"stds": {"hidden": -0.1}}, "rule hidden: a law normal takes no standard deviation -0.1"),
            ({"stds": {"hidden": float("nan")}}, "takes no standard deviation nan"),
            ({"stds": {"input_bias": 0.1}}, "rule input_bias: a law zeros takes no standard deviation"),
            ({"laws": {"output": "zeroes"}}, "rule output has a law 'zeroes'; there are normal"),
        ],
    )
    def test_what_cannot_be_drawn_is_refused_before_anything_is(
        self, generated: Generated, renaming: dict, says: str
    ) -> None:
        module, model = generated("mlp"), MLP(64)
        before = values(model)
        with pytest.raises(ValueError, match=says):
            module.init_(model, scaling=module.SCALING.rename({}, **renaming), **WIDE)
        assert same(values(model), before)
        assert model.output_multiplier == 1

    def test_keeps_what_is_frozen_on_the_meta_device(self, generated: Generated) -> None:
        with torch.device("meta"):
            model = MLP(64)
        model.input.weight.requires_grad_(False)
        generated("mlp").init_(model, **WIDE)
        assert [name for name, each in model.named_parameters() if not each.requires_grad] == ["input.weight"]


class TestMuon:
    def test_groups_say_whose_they_are(self, generated: Generated) -> None:
        module = generated("mlp", optimizer="muon")
        model = ready(module)
        groups = module.param_groups(model, lr=1e-2, **WIDE)
        owners = {group["name"]: group.pop("optimizer") for group in groups}
        assert owners == {
            "input": "muon",
            "input_bias": "adamw",
            "hidden": "muon",
            "hidden_bias": "adamw",
            "output": "adamw",
        }
        if not hasattr(torch.optim, "Muon"):
            pytest.skip("this torch has no Muon")
        for kind, optimizer in (("muon", torch.optim.Muon), ("adamw", torch.optim.AdamW)):
            trained(model, optimizer([group for group in groups if owners[group["name"]] == kind]), 2)


class TestGauges:
    def test_can_be_changed_on_one_model(self, generated: Generated) -> None:
        model = MLP(64)
        generated("mlp").init_(model, **WIDE)
        assert model.output_multiplier == 0.25
        absorbed = generated("mlp", gauge="absorbed")
        with pytest.raises(ValueError, match=r"output_multiplier is 0\.25, not 1: call init_ or set_multipliers"):
            absorbed.param_groups(model, lr=0.1, **WIDE)
        absorbed.init_(model, **WIDE)
        assert model.output_multiplier == 1

    @pytest.mark.parametrize(("name", "optimizer"), [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)])
    def test_train_alike(self, generated: Generated, name: str, optimizer: type[torch.optim.Optimizer]) -> None:
        runs = []
        for gauge in ("multiplier", "absorbed"):
            module, model = generated("mlp", optimizer=name, gauge=gauge), MLP(48).double()
            module.init_(model, width=48, base_width=16)
            groups = module.param_groups(model, lr=1e-2, weight_decay=0.1, width=48, base_width=16)
            runs.append(trained(model, optimizer(groups), 20))
        assert runs[0] == pytest.approx(runs[1], rel=1e-10)
        assert runs[0][-1] < runs[0][0]


class TestPacked:
    """One matrix that holds several roles by rows."""

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 64)
            self.both = nn.Parameter(torch.zeros(2 * 64, 64))
            self.biases = nn.Parameter(torch.zeros(2 * 64))
            self.output = nn.Linear(64, 5, bias=False)

    NAMES = {  # noqa: RUF012
        "first.weight": "input",
        "first.bias": "input_bias",
        "both": {"hidden": 16, "other": 16},
        "biases": "hidden_bias",
    }

    def test_rows_get_their_own_rule(self, generated: Generated) -> None:
        module, model = generated("mlp", gauge="absorbed"), self.Packed()
        other = module.replace(module.RULES[2], role="other", init_std=-1.5)
        scaling = module.replace(module.SCALING, rules=(*module.RULES, other))
        assert module.RULES[2].role == "hidden"
        scaling = scaling.rename(self.NAMES)
        # the biases are twice as long as the rules say
        with pytest.raises(ValueError, match="axis n has 128 entries, and 64 elsewhere"):
            module.init_(model, scaling=scaling, **WIDE)
        model.biases = nn.Parameter(torch.zeros(64))
        module.init_(model, scaling=scaling, **WIDE)
        rows = model.both.view(-1, 32, 64)
        assert rows[:, :16].std().item() == pytest.approx(16**-0.5 * 4**-0.5, rel=0.05)
        assert rows[:, 16:].std().item() == pytest.approx(16**-0.5 * 4**-1.5, rel=0.05)
        groups = module.param_groups(model, lr=0.1, scaling=scaling, **WIDE)
        assert "hidden+other" in [each["name"] for each in groups]
        with pytest.raises(ValueError, match=r"the rows of both need different groups \(hidden, other\)"):
            module.param_groups(model, lr=0.1, scaling=scaling, lr_multipliers={"other": 0.5}, **WIDE)

    def test_rows_that_need_other_learning_rates_are_refused(self, generated: Generated) -> None:
        module, model = generated("mlp", gauge="absorbed"), self.Packed()
        model.biases = nn.Parameter(torch.zeros(64))
        other = module.replace(module.RULES[2], role="other", lr=0)
        scaling = module.replace(module.SCALING, rules=(*module.RULES, other)).rename(self.NAMES)
        with pytest.raises(ValueError, match=r"the rows of both need different groups \(hidden, other\)"):
            module.param_groups(model, lr=0.1, scaling=scaling, **WIDE)

    def test_rows_that_do_not_fit_are_refused(self, generated: Generated) -> None:
        module, model = generated("mlp", gauge="absorbed"), self.Packed()
        scaling = module.SCALING.rename(self.NAMES | {"both": {"hidden": 48}})
        with pytest.raises(ValueError, match=r"both \[128, 64\]: hidden do not make up 128 rows"):
            module.init_(model, scaling=scaling, **WIDE)

    def test_roles_that_there_are_not_are_refused(self, generated: Generated) -> None:
        with pytest.raises(ValueError, match="there are no roles hiden"):
            generated("mlp").SCALING.rename({"both": {"hiden": 3}})
