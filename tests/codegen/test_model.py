"""The model that is emitted is the graph that was derived: the same logits, the same gradients, the same parameters."""

import copy
import re
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from widthwise.codegen.request import Request
from widthwise.derive import Graph
from widthwise.derive.graph import atoms
from widthwise.verify.execute import Setting, execute

Generated = Callable[..., ModuleType]

EPS = 1e-6  # of the scan's own normalization, so that one eps serves the whole execution
SIZES = {"width": 16, "vocab": 11, "H": 2, "d_k": 8, "d_v": 12, "G": 2, "ffn": 24, "taps": 4, "d_head": 8}
VARIANTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "heads-fixed": ("gated_deltanet", ()),
    "head-dim-fixed": ("gated_deltanet", ("scaling=head-dim-fixed",)),
    "tied": ("gated_deltanet", ("tied=on",)),
    "no activation": ("gated_deltanet", ("activation=off",)),
    "no convolution": ("gated_deltanet", ("conv=off",)),
    "neither": ("gated_deltanet", ("activation=off", "conv=off")),
    "no gate": ("gated_deltanet", ("gate=off",)),
    "no decay": ("gated_deltanet", ("decay=off",)),
    "no o_scale": ("gated_deltanet", ("o_scale=off",)),
    "key scale": ("gated_deltanet", ("qk_scale=d_k^-1/2",)),
    "value groups": ("gated_deltanet", ("value_groups=on",)),
    "no MLP": ("gated_deltanet", ("mlp=off",)),
    "bare": (
        "gated_deltanet",
        ("activation=off", "conv=off", "gate=off", "decay=off", "o_scale=off", "mlp=off", "value_groups=on"),
    ),
    "deltanet": ("deltanet", ()),
    "gated deltanet, all": ("gated_deltanet", ("value_groups=on", "tied=on", "scaling=head-dim-fixed")),
}
each_variant = pytest.mark.parametrize("variant", VARIANTS)


def made(generated: Generated, variant: str, **arguments: Any) -> tuple[nn.Module, Graph, ModuleType]:
    """A model of one layer in float64, which is what a graph describes, and its graph."""
    name, options = VARIANTS[variant]
    module = generated(name, "model", options=options)
    cls = next(each for each in vars(module).values() if isinstance(each, type) and each.__name__.endswith("LM"))
    sizes = {name: SIZES[name] for name in module.AXES if name in SIZES}
    arguments = {"depth": 1, "dtype": torch.float64, "norm_eps": EPS} | sizes | arguments
    return cls(**arguments), Request(name, options=options).graph(), module


def setting(module: ModuleType, width: int = 16, **multipliers: float) -> Setting:
    sizes = {**SIZES, "d_model": SIZES["width"], "features": 5, "classes": 3}
    return Setting(width, 16, sizes, EPS, multipliers)


def parameters(model: nn.Module, graph: Graph, setting: Setting) -> dict[str, Tensor]:
    """The model's own parameters by role, with one axis an axis, as execution has them."""
    named = {re.sub(r"\.\d+(?=\.)", ".*", name): parameter for name, parameter in model.named_parameters()}
    return {role: named[each.patterns[0]].reshape(setting.shape(each.shape)) for role, each in graph.parameters.items()}


def tokens(batch: int = 2, length: int = 9, seed: int = 0) -> Tensor:
    return torch.randint(SIZES["vocab"], (batch, length), generator=torch.Generator().manual_seed(seed))


def shaken(model: nn.Module) -> nn.Module:
    """Every parameter moved off its base value: gains of one would hide that they are not used."""
    with torch.no_grad():
        for place, parameter in enumerate(model.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(place), dtype=torch.float64)
            parameter.add_(0.3 * noise.to(parameter.dtype))
    return model


# -- the graph that was derived is the graph that runs -------------------------------------------------------------


@each_variant
def test_logits_and_gradients_are_those_of_the_graph(generated: Generated, variant: str) -> None:
    name, options = VARIANTS[variant]
    _, _, module = made(generated, variant)
    multipliers = {role: 0.4 + 0.2 * place for place, role in enumerate(module.MULTIPLIERS)}
    model, graph, _ = made(generated, variant, multipliers=multipliers)
    shaken(model)
    theirs = dict(multipliers)
    if "qk_scale=d_k^-1/2" in options:  # execution has the power of the ratio of widths alone
        theirs["o_scale"] *= SIZES["d_k"] ** -0.5
    given = setting(module, **theirs)
    leaves = parameters(model, graph, given)
    x, y = tokens(), tokens(seed=1)
    table = Request(name, options=options).table(graph)
    run = execute(graph, table, given, leaves, {"tokens": x, "targets": y})
    expected = torch.autograd.grad(run.tensors["loss"], list(model.parameters()))
    logits, loss = model(x, y)
    torch.testing.assert_close(logits, run.tensors["logits"], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(loss, run.tensors["loss"], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model(x), logits, rtol=0, atol=0)
    for parameter, wanted, gradient in zip(
        model.named_parameters(), expected, torch.autograd.grad(loss, list(model.parameters())), strict=True
    ):
        torch.testing.assert_close(gradient, wanted, rtol=1e-7, atol=1e-9, msg=lambda text, at=parameter[0]: at + text)


@each_variant
def test_every_parameter_is_one_of_the_graph(generated: Generated, variant: str) -> None:
    model, graph, module = made(generated, variant, depth=3)
    given = setting(module)
    names = {re.sub(r"\.\d+(?=\.)", ".*", name): parameter for name, parameter in model.named_parameters()}
    assert set(names) == {each.patterns[0] for each in graph.parameters.values()}
    for each in graph.parameters.values():
        sizes = tuple(given.shape((group,)) for group in each.shape)
        assert tuple(names[each.patterns[0]].shape) == tuple(torch.Size(size).numel() for size in sizes), each.role
        count = sum(re.fullmatch(re.escape(each.patterns[0]).replace(r"\*", r"\d+"), name) is not None
                    for name, _ in model.named_parameters())  # fmt: skip
        assert count == (3 if "*" in each.patterns[0] else 1)


def test_multipliers_of_weights_are_applied_where_the_rules_have_them(generated: Generated) -> None:
    request = Request("gated_deltanet", parametrization="ntk", options=("mlp=off",))
    module = generated("gated_deltanet", "model", parametrization="ntk", options=("mlp=off",))
    graph = request.graph()
    table = request.table(graph)
    wide = setting(module, width=64)
    sizes = {name: SIZES[name] for name in module.AXES if name in SIZES}
    factors = {role: 4.0 ** float(table.rule(role).multiplier or 0) for role in module.MULTIPLIERS}
    assert {"q_proj", "lm_head", "o_scale"} <= set(factors)
    model = module.GatedDeltaNetLM(
        **module.GatedDeltaNetLM.widened(64, depth=1, **sizes), norm_eps=EPS, dtype=torch.float64, multipliers=factors
    )
    x, y = tokens(), tokens(seed=1)
    run = execute(graph, table, wide, parameters(shaken(model), graph, wide), {"tokens": x, "targets": y})
    torch.testing.assert_close(model(x, y)[0], run.tensors["logits"], rtol=1e-9, atol=1e-10)


def test_a_tied_readout_starts_at_logits_of_order_one(generated: Generated) -> None:
    model, graph, module = made(generated, "tied")
    assert model.lm_head_multiplier == 16**-0.5
    table = Request("gated_deltanet", tied=True).table()
    x, y = tokens(), tokens(seed=1)
    given = setting(module)
    run = execute(graph, table, given, parameters(model, graph, given), {"tokens": x, "targets": y})
    torch.testing.assert_close(model(x), run.tensors["logits"], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("options", [(), ("dims=1,1/2",), ("activation=tanh", "bias=off")])
def test_an_mlp_is_emitted_too(generated: Generated, options: tuple[str, ...]) -> None:
    module, graph = generated("mlp", "model", options=options), Request("mlp", options=options).graph()
    sizes = {"width": 16, "n2": 4, "features": 5, "classes": 3} | ({} if "n2" in module.AXES else {"depth": 1})
    model = shaken(
        module.MLP(**{name: size for name, size in sizes.items() if name in module.AXES}, dtype=torch.float64)
    )
    given = Setting(16, 16, {"n": 16, "n1": 16, "n2": 4, "features": 5, "classes": 3}, EPS, {})
    x, y = torch.randn(2, 3, 5, dtype=torch.float64), torch.tensor([[0, 1, 2], [2, 1, 0]])
    inputs = {"x": x, "targets": y}
    run = execute(graph, Request("mlp", options=options).table(graph), given, parameters(model, graph, given), inputs)
    torch.testing.assert_close(model(x, y)[1], run.tensors["loss"], rtol=1e-10, atol=1e-10)


# -- softmax attention, which execution cannot run ------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ("gqa=on", "qk_norm=on", "tied=on")])
def test_attention_is_causal_and_generates(generated: Generated, options: tuple[str, ...]) -> None:
    module = generated("transformer", "model", options=options)
    sizes = {name: SIZES[name] for name in module.AXES if name in SIZES}
    model = shaken(module.TransformerLM(depth=2, dtype=torch.float64, multipliers={"attn_scale": 0.3}, **sizes))
    x = tokens()
    whole = model(x)
    torch.testing.assert_close(model(x[:, :4]), whole[:, :4])
    cache: dict[Any, Tensor] = {}
    parts = [model(part, cache=cache) for part in (x[:, :3], x[:, 3:4], x[:, 4:7], x[:, 7:8], x[:, 8:])]
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_attention_is_softmax_of_scaled_products(generated: Generated) -> None:
    module = generated("transformer", "model", options=("gqa=on",))
    layer = module.Attention(module.Config(
        width=16, depth=1, vocab=11, H=2, G=2, d_head=8, ffn=24, norm_eps=1e-5, checkpoint=False)).double()  # fmt: skip
    layer.attn_scale = 0.7
    h = torch.randn(2, 5, 16, dtype=torch.float64)
    q = layer.q_proj(h).view(2, 5, 2, 2, 8)
    k, v = (each(h).view(2, 5, 2, 8) for each in (layer.k_proj, layer.v_proj))
    scores = 0.7 * torch.einsum("bthgd,bshd->bhgts", q, k)
    weights = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf).softmax(-1)
    o = torch.einsum("bhgts,bshd->bthgd", weights, v)
    torch.testing.assert_close(layer(h), layer.o_proj(o.flatten(2)))


# -- generation -----------------------------------------------------------------------------------------------------


@each_variant
def test_token_by_token_equals_in_parallel(generated: Generated, variant: str) -> None:
    model, _, _ = made(generated, variant, depth=2)
    shaken(model)
    x = tokens(length=12)
    whole = model(x)
    cache: dict[Any, Tensor] = {}
    parts = [model(x[:, :5], cache=cache)] + [model(x[:, t : t + 1], cache=cache) for t in range(5, 10)]
    parts.append(model(x[:, 10:], cache=cache))
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-10)


def test_generate_continues_by_the_likeliest_tokens(generated: Generated) -> None:
    model, _, _ = made(generated, "heads-fixed", depth=2)
    shaken(model)
    text = model.generate(tokens(length=3), 6, temperature=0)
    assert text.shape == (2, 9)
    assert torch.equal(text[:, :3], tokens(length=3))
    assert torch.equal(model(text)[:, 2:-1].argmax(-1), text[:, 3:])
    assert torch.equal(model.generate(tokens(length=1), 0), tokens(length=1))


def test_generate_draws_from_a_generator(generated: Generated) -> None:
    model, _, _ = made(generated, "heads-fixed")
    drawn = [model.generate(tokens(), 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("prompt", [torch.zeros(2, 0, dtype=torch.long), torch.zeros(3, dtype=torch.long)])
def test_generate_needs_a_prompt(generated: Generated, prompt: Tensor) -> None:
    model, _, _ = made(generated, "heads-fixed")
    with pytest.raises(ValueError, match="prompt has shape"):
        model.generate(prompt, 3)


# -- base values ----------------------------------------------------------------------------------------------------


def test_parameters_depend_on_the_seed_and_their_names_alone(generated: Generated) -> None:
    before = torch.random.get_rng_state()
    deep, _, _ = made(generated, "heads-fixed", depth=3, seed=5)
    one, _, _ = made(generated, "heads-fixed", depth=1, seed=5)
    other, _, _ = made(generated, "heads-fixed", depth=1, seed=6)
    assert torch.equal(torch.random.get_rng_state(), before)
    same = dict(deep.named_parameters())
    assert all(torch.equal(parameter, same[name]) for name, parameter in one.named_parameters())
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    assert not torch.equal(deep.model.layers[0].attn.q_proj.weight, deep.model.layers[1].attn.q_proj.weight)


def test_base_values_follow_their_laws(generated: Generated) -> None:
    model, _, _ = made(generated, "heads-fixed", width=256, ffn=512, d_k=128, d_v=128)
    attn = model.model.layers[0].attn
    assert float(attn.q_proj.weight.detach().std()) == pytest.approx(256**-0.5, rel=0.05)
    assert float(model.model.embeddings.weight.detach().std()) == pytest.approx(1, rel=0.05)
    assert 0.4 < float(attn.q_conv1d.weight.detach().abs().max()) <= 0.5
    assert bool((attn.A_log > 0).all())
    assert bool((attn.A_log <= 2.78).all())
    step = nn.functional.softplus(attn.dt_bias)
    assert bool((step > 9e-4).all())
    assert bool((step < 0.11).all())
    assert bool((attn.o_norm.weight == 1).all())


def test_on_the_meta_device_nothing_is_drawn_until_asked(generated: Generated) -> None:
    drawn, _, _ = made(generated, "heads-fixed", seed=3)
    with torch.device("meta"):
        model, _, _ = made(generated, "heads-fixed", seed=3)
    empty, _, _ = made(generated, "heads-fixed", device="meta")
    assert all(parameter.is_meta for each in (model, empty) for parameter in each.parameters())
    model.to_empty(device="cpu")
    model.reset_parameters(3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), drawn.parameters(), strict=True))


@pytest.mark.parametrize("variant", ["heads-fixed", "head-dim-fixed", "tied", "value groups"])
def test_at_the_base_width_initialization_by_the_rules_is_the_plain_one(generated: Generated, variant: str) -> None:
    name, options = VARIANTS[variant]
    rules = generated(name, options=options)
    model, _, _ = made(generated, variant, depth=2, seed=7)
    again, _, _ = made(generated, variant, depth=2, seed=8)
    rules.init_(again, width=16, base_width=16, seed=7)
    for (where, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), where
    assert torch.equal(model(tokens()), again(tokens()))


def test_multipliers_of_the_rules_have_places_in_the_model(generated: Generated) -> None:
    model, _, _ = made(generated, "heads-fixed", depth=2)
    rules = generated("gated_deltanet")
    places = rules.set_multipliers(model, width=64, base_width=16)
    assert places == {
        "model.layers.0.attn.o_scale": 2.0,
        "model.layers.1.attn.o_scale": 2.0,
        "lm_head_multiplier": 0.25,
    }
    by_hand, _, _ = made(generated, "heads-fixed", depth=2, multipliers=rules.multipliers(width=64, base_width=16))
    assert torch.equal(model(tokens()), by_hand(tokens()))


def test_an_unknown_multiplier_is_refused(generated: Generated) -> None:
    with pytest.raises(ValueError, match="no multipliers q_scale; there are o_scale, lm_head"):
        made(generated, "heads-fixed", multipliers={"q_scale": 2.0})


def test_widened_follows_the_axes(generated: Generated) -> None:
    sizes = {"width": 16, "depth": 2, "vocab": 11, "H": 2, "d_k": 8, "d_v": 12, "ffn": 24}
    fixed = generated("gated_deltanet", "model").GatedDeltaNetLM
    assert fixed.widened(64, **sizes) == sizes | {"width": 64, "d_k": 32, "d_v": 48, "ffn": 96}
    heads = generated("gated_deltanet", "model", options=("scaling=head-dim-fixed",)).GatedDeltaNetLM
    assert heads.widened(64, **sizes) == sizes | {"width": 64, "H": 8, "ffn": 96}
    with pytest.raises(ValueError, match=r"d_v = 12 at width 16 would be 15 at|d_k = 8 at width 16 would be 7.5"):
        fixed.widened(15, **sizes)


# -- dtypes, memory, tools ------------------------------------------------------------------------------------------


def test_recomputing_layers_changes_no_gradient(generated: Generated) -> None:
    plain, _, _ = made(generated, "heads-fixed", depth=3)
    saving, _, _ = made(generated, "heads-fixed", depth=3, checkpoint=True)
    for model in (plain, saving):
        model(tokens(), tokens(seed=1))[1].backward()
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_recomputing_layers_keeps_less(generated: Generated) -> None:
    def kept(checkpoint: bool) -> int:
        model, _, _ = made(generated, "heads-fixed", depth=3, checkpoint=checkpoint)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            model(tokens())
        return sum(sizes)

    assert kept(True) < kept(False) / 3


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("variant", ["heads-fixed", "tied", "bare", "deltanet", "value groups"])
@pytest.mark.parametrize("how", ["bf16", "autocast"])
def test_in_bf16_it_trains_and_generates(generated: Generated, variant: str, how: str) -> None:
    exact, _, _ = made(generated, variant, depth=2, dtype=torch.float32)
    model, _, _ = made(generated, variant, depth=2, dtype=torch.bfloat16 if how == "bf16" else torch.float32)
    x, y = tokens(), tokens(seed=1)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        logits, loss = model(x, y)
        text = model.generate(x, 3, temperature=0)
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert text.shape == (2, 12)
    torch.testing.assert_close(logits.float(), exact(x), rtol=0.2, atol=0.2)
    loss.backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters())


def test_decay_is_computed_in_single_precision_in_a_bf16_model(
    generated: Generated, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _, module = made(generated, "heads-fixed", dtype=torch.bfloat16)
    seen: list[Mapping[str, torch.dtype]] = []
    scan = module.gated_delta_rule

    def watched(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **options: Any) -> Any:
        seen.append({"q": q.dtype, "g": g.dtype})
        return scan(q, k, v, g, beta, **options)

    monkeypatch.setattr(module, "gated_delta_rule", watched)
    model(tokens())
    assert seen == [{"q": torch.bfloat16, "g": torch.float32}]


@pytest.mark.parametrize("variant", ["heads-fixed", "tied"])
def test_it_compiles_as_one_graph(generated: Generated, variant: str) -> None:
    model, _, _ = made(generated, variant, depth=2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, y = tokens(), tokens(seed=1)
    logits, loss = compiled(x, y)
    torch.testing.assert_close(logits, model(x))
    loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model(x, y)[1].backward()
    torch.testing.assert_close(gradients, [parameter.grad for parameter in model.parameters()])


@pytest.mark.slow
def test_it_compiles_for_sequences_of_any_length(generated: Generated) -> None:
    model, _, _ = made(generated, "heads-fixed", depth=2, dtype=torch.float32)
    compiled = torch.compile(model, dynamic=True)
    for length in (5, 9, 65):
        logits, loss = compiled(tokens(length=length), tokens(length=length, seed=1))
        loss.backward()
        torch.testing.assert_close(logits, model(tokens(length=length)), rtol=1e-4, atol=1e-4)


def test_it_compiles_as_one_graph_where_layers_are_recomputed(generated: Generated) -> None:
    model, _, _ = made(generated, "heads-fixed", checkpoint=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(tokens(), tokens(seed=1))[1].backward()
    torch.testing.assert_close(compiled(tokens()), model(tokens()))


def test_it_exports(generated: Generated) -> None:
    model, _, _ = made(generated, "heads-fixed")
    exported = torch.export.export(model, (tokens(),))
    torch.testing.assert_close(exported.module()(tokens()), model(tokens()))


def test_copies_and_state_dicts(generated: Generated) -> None:
    model, _, _ = made(generated, "tied", multipliers={"o_scale": 3.0})
    shaken(model)
    twin = copy.deepcopy(model)
    fresh, _, _ = made(generated, "tied", seed=9, multipliers={"o_scale": 3.0})
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(twin(tokens()), model(tokens()))
    assert torch.equal(fresh(tokens()), model(tokens()))
    assert len(model.state_dict()) == len(list(model.parameters()))


def test_a_training_run_lowers_the_loss(generated: Generated) -> None:
    model, _, _ = made(generated, "heads-fixed", dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x = tokens(length=33)
    losses = []
    for _ in range(20):
        loss = model(x[:, :-1], x[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2


def test_shapes_are_all_axes(generated: Generated) -> None:
    _, graph, module = made(generated, "value groups")
    used = {dim.name for each in graph.parameters.values() for dim in atoms(each.shape)}
    assert set(module.AXES) == (used - {"d_model"}) | {"width", "depth"}
