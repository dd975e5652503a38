"""Models of descriptions that are not ours: what they must get right, and what is refused."""

import copy
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import odd_models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from widthwise.codegen.model import context
from widthwise.codegen.render import render
from widthwise.codegen.request import Request
from widthwise.codegen.text import check_names
from widthwise.derive import Builder, Graph, derive
from widthwise.derive.builder import Tensor as Handle
from widthwise.derive.errors import DeriveError
from widthwise.kernels import gated_delta_rule_reference
from widthwise.verify.execute import Setting, execute

Generated = Callable[..., ModuleType]

EPS = 1e-6
SIZES = {"width": 16, "vocab": 11, "H": 2, "K": 8, "V": 6, "ffn": 24, "taps": 3}
ODD = {
    "interleaved": (),
    "borrowed": (),
    "broadcast": (),
    "scanned": (),
    "one norm": ("normalized=k",),
    "constant_decay": (),
    "two_lists": (),
    "shared_table": (),
}
each_model = pytest.mark.parametrize("name", ODD)
HOSTILE = [
    "x'); import os; os.system('true') #",
    'x"); raise SystemExit #',
    "x\nimport os",
    'x"""\nimport os\n"""',
    "{{ 7 * 7 }}",
    "{% include 'draw.py.jinja' %}",
    "x\\",
    "x\u2028y",
    "class",
    "a b",
    "ｘ",  # normalizes to an ASCII name in Python source
]
ROOT = Path(__file__).parents[2]


def request(name: str) -> Request:
    return Request(f"odd_models:{'scanned' if name == 'one norm' else name}", options=ODD[name])


def made(generated: Generated, name: str, **arguments: Any) -> nn.Module:
    asked = request(name)
    module = generated(asked.architecture, "model", options=asked.options)
    cls = next(each for each in vars(module).values() if isinstance(each, type) and each.__name__.endswith("LM"))
    sizes = {axis: SIZES.get(axis, 1) for axis in module.AXES}
    model: nn.Module = cls(**({"dtype": torch.float64, "norm_eps": EPS} | sizes | arguments))
    for place, parameter in enumerate(model.parameters()):
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(place))
        parameter.data.add_(0.3 * noise.to(parameter.dtype))
    return model


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(11, (2, 7), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", sorted(set(ODD) - {"constant_decay"}))  # execution has gates of every token alone
def test_logits_and_gradients_are_those_of_the_graph(generated: Generated, name: str) -> None:
    model, graph = made(generated, name), request(name).graph()
    setting = Setting(16, 16, SIZES | {"d_model": 16}, EPS, {})
    named = {re.sub(r"\.\d+(?=\.)", ".*", path): parameter for path, parameter in model.named_parameters()}
    leaves = {
        role: named[each.patterns[0]].reshape(setting.shape(each.shape)) for role, each in graph.parameters.items()
    }
    assert len(leaves) == len(named)
    x, y = tokens(), tokens(1)
    run = execute(graph, request(name).table(graph), setting, leaves, {"tokens": x, "targets": y})
    logits, loss = model(x, y)
    made_by = next(node.inputs[0] for node in graph.nodes if node.op == "cross_entropy")
    torch.testing.assert_close(logits, run.tensors[made_by], rtol=1e-9, atol=1e-10)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == sum(each.trainable for each in graph.parameters.values())
    torch.testing.assert_close(torch.autograd.grad(loss, trained), torch.autograd.grad(run.tensors["loss"], trained))


def test_gates_that_come_of_parameters_alone_are_those_of_every_token(generated: Generated) -> None:
    model = made(generated, "constant_decay")
    block = model.blocks[0]
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    h = block.norm(x)
    q, k, v = (each(h).unflatten(-1, (2, -1)) for each in (block.q_proj, block.k_proj, block.v_proj))
    g, beta = (each.expand(2, 5, 2) for each in (nn.functional.logsigmoid(block.decay), block.strength.sigmoid()))
    o, _ = gated_delta_rule_reference(q, k, v, g, beta, scale=1.0, normalize_qk=True)
    torch.testing.assert_close(block(x), x + block.out(o.flatten(2)))


@each_model
def test_token_by_token_equals_in_parallel(generated: Generated, name: str) -> None:
    model = made(generated, name)
    cache: dict[Any, Tensor] = {}
    parts = [model(part, cache=cache) for part in (tokens()[:, :3], tokens()[:, 3:4], tokens()[:, 4:])]
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens()))
    assert model.generate(tokens(), 2).shape == (2, 9)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("how", ["bf16", "autocast"])
@each_model
def test_in_bf16_it_trains(generated: Generated, name: str, how: str) -> None:
    exact = made(generated, name)
    model = copy.deepcopy(exact).to(torch.bfloat16 if how == "bf16" else torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        logits, loss = model(tokens(), tokens(1))
    loss.backward()
    assert logits.dtype == torch.bfloat16
    assert float((logits.double() - exact(tokens())).detach().abs().mean()) < 0.1


@each_model
def test_recomputing_changes_nothing(generated: Generated, name: str) -> None:
    plain, saving = made(generated, name), made(generated, name, checkpoint=True)
    for model in (plain, saving):
        model(tokens(), tokens(1))[1].backward()
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad)


def test_weights_with_multipliers_keep_their_biases_out_of_them(generated: Generated) -> None:
    asked = Request("odd_models:interleaved", parametrization="ntk")
    module, graph = generated(asked.architecture, "model", parametrization="ntk"), asked.graph()
    factors = {role: 0.3 + 0.1 * place for place, role in enumerate(module.MULTIPLIERS)}
    assert {"one", "two", "three", "head"} <= set(factors)
    model = module.InterleavedLM(width=16, vocab=11, norm_eps=EPS, dtype=torch.float64, multipliers=factors)
    for parameter in model.parameters():
        parameter.data.add_(0.1)
    setting = Setting(16, 16, {"d_model": 16, "vocab": 11}, EPS, factors)
    named = dict(model.named_parameters())
    leaves = {role: named[each.patterns[0]] for role, each in graph.parameters.items()}
    run = execute(graph, asked.table(), setting, leaves, {"tokens": tokens(), "targets": tokens(1)})
    torch.testing.assert_close(model(tokens()), run.tensors["logits"], rtol=1e-9, atol=1e-10)


# -- text -----------------------------------------------------------------------------------------------------------

NAMED = [
    ("gated_deltanet", ()),
    ("gated_deltanet", ("scaling=head-dim-fixed", "tied=on", "value_groups=on", "qk_scale=d_k^-1/2")),
    ("gated_deltanet", ("activation=off", "conv=off", "gate=off", "decay=off", "o_scale=off", "mlp=off")),
    ("deltanet", ()),
    ("transformer", ()),
    ("transformer", ("gqa=on", "qk_norm=on", "tied=on")),
    ("mlp", ()),
    ("mlp", ("dims=1,1/2",)),
]


@pytest.fixture(scope="module")
def emitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("emitted")
    shutil.copy(ROOT / "pyproject.toml", folder)
    requests = [Request(name, options=options) for name, options in NAMED] + [request(name) for name in ODD]
    requests.append(Request("gated_deltanet", parametrization="ntk", gauge="absorbed"))
    for place, asked in enumerate(requests):
        (folder / f"emitted_{place}.py").write_text(render(asked, "model"), encoding="utf-8")
    return folder


def run(folder: Path, *command: str) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_emitted_text_is_clean_and_formatted(emitted: Path) -> None:
    run(emitted, "ruff", "check", "--no-cache", ".")
    run(emitted, "ruff", "format", "--no-cache", "--check", ".")


def test_emitted_text_is_typed(emitted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MYPYPATH", str(ROOT / "src"))
    files = sorted(file.name for file in emitted.glob("*.py"))
    run(emitted, "mypy", "--strict", "--cache-dir", str(ROOT / ".mypy_cache"), "--config-file", "", *files)


def test_equal_requests_give_equal_text() -> None:
    assert render(Request("gated_deltanet"), "model") == render(Request("gated_deltanet"), "model")


# -- what is refused ------------------------------------------------------------------------------------------------


def small(**names: str) -> Graph:
    """A graph whose names can be chosen."""
    g = Builder(names.get("name", "small"), title=names.get("title", "Small"))
    n, vocab = g.dim(names.get("axis", "d_model"), 1), g.dim(names.get("other", "vocab"))
    x = g.embedding(names.get("table", "model.embed"), vocab, n, output=names.get("tensor", "x"))
    x = g.repeat(names.get("list", "model.layers"), 1, lambda x: g.residual(x, g.linear(x, "ff.up", n)), x)
    x = g.scale(x, multiplier=names.get("carrier", "factor"))
    g.cross_entropy(g.readout(g.norm(x, "final"), "head", vocab))
    return g.build()


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        ({"tensor": "x; import os"}, "'x; import os' cannot be a name in code"),
        ({"tensor": "x\nimport os"}, "cannot be a name in code"),
        ({"tensor": "{{ x }}"}, "cannot be a name in code"),
        ({"tensor": "class"}, "cannot be a name in code"),
        ({"tensor": "ｘ"}, "cannot be a name in code"),
        ({"tensor": "__class__"}, "cannot be a name in code"),
        ({"other": "depth"}, "axis 'depth' has the name of another argument"),
        ({"other": "checkpoint"}, "axis 'checkpoint' has the name of another argument"),
        ({"carrier": "final"}, "needs another attribute 'final'"),
        ({"carrier": "forward"}, "needs another attribute 'forward'"),
        ({"table": "model.train"}, "needs another attribute 'train'"),
        ({"table": "model.layers"}, "needs another attribute 'layers'"),
        ({"table": "head.embed"}, "needs another attribute 'head'"),
        ({"tensor": "x" * 120}, "more than 120 characters"),
    ],
)
def test_names_that_cannot_be_or_are_in_the_way(names: dict[str, str], complaint: str) -> None:
    made = small(**names)
    with pytest.raises(DeriveError, match=complaint):
        context(made, derive(made))


PLACES = ["name", "title", "axis", "other", "tensor", "list", "carrier"]


def check(place: str, name: str) -> None:
    """What render does before it writes."""
    made = small(**{place: name})
    check_names(made)
    context(made, derive(made))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("hostile", HOSTILE)
def test_nothing_that_a_description_says_becomes_code(place: str, hostile: str) -> None:
    with pytest.raises(DeriveError):
        check(place, hostile)


@given(st.text(max_size=30), st.sampled_from(PLACES))
@settings(max_examples=60, deadline=None)
def test_any_text_is_a_name_or_refused(text: str, place: str) -> None:
    try:
        check(place, text)
    except DeriveError:
        return
    assert re.fullmatch(r"([A-Za-z_][A-Za-z0-9_]*)?(\.[A-Za-z_][A-Za-z0-9_]*)*", text)


@pytest.mark.parametrize(
    ("name", "options", "complaint"),
    [
        ("mamba2", (), "no kernel computes the scan 'o': it writes without erasing"),
        ("gated_linear_attention", (), "no kernel computes the scan 'o'"),
        ("gated_deltanet", ("scaling=mixed",), "symbolic"),
    ],
)
def test_architectures_that_no_model_computes(name: str, options: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(DeriveError, match=complaint) as caught:
        render(Request(name, options=options), "model")
    assert caught.value.cure
    if "scan" in complaint:
        assert caught.value.where


def unusual(describe: Callable[[Builder, Handle, Any, Any], Handle]) -> Graph:
    """One layer of somebody's making between a table and a readout."""
    g = Builder("unusual", title="Unusual")
    n, vocab = g.dim("d_model", 1), g.dim("vocab")
    x = describe(g, g.embedding("embed", vocab, n, output="x"), n, vocab)
    g.cross_entropy(g.readout(g.norm(x, "final"), "head", vocab))
    return g.build()


def channel_decay(g: Builder, x: Handle, n: Any, _: Any) -> Handle:
    H, K = g.dim("H"), g.dim("K", 1)
    q, k, v = (g.reshape(g.linear(x, f"{which}_proj", H * K), H, K) for which in "qkv")
    f = g.reshape(g.pointwise("sigmoid", g.linear(x, "f_proj", H * K)), H, K)
    beta = g.pointwise("sigmoid", g.linear(x, "b_proj", H))
    o = g.scan(q, g.norm(k, kind="l2_norm"), v, decay=f, strength=beta)
    return g.linear(g.reshape(o, H * K), "o_proj", n)


def odd_eps(g: Builder, x: Handle, n: Any, _: Any) -> Handle:
    return g.linear(g.norm(x, "first", eps=1e-3), "up", n)


def power(g: Builder, x: Handle, n: Any, _: Any) -> Handle:
    return g.scale(g.linear(x, "up", n), "-1/2")


def tied_bias(g: Builder, x: Handle, n: Any, _: Any) -> Handle:
    x = g.pointwise("relu", g.linear(x, "up", n))
    return g.linear(x, "again", n, bias=True, tied_to="up")


@pytest.mark.parametrize(
    ("describe", "complaint"),
    [
        (channel_decay, "gates must be one number a head"),
        (odd_eps, "norms have the epsilons 1e-05, 0.001, and a model has one"),
        (power, "a factor without a power of the width"),
        (tied_bias, "no layer holds again_bias"),
    ],
)
def test_graphs_that_no_model_computes(describe: Any, complaint: str) -> None:
    made = unusual(describe)
    with pytest.raises(DeriveError, match=complaint) as caught:
        context(made, derive(made))
    assert caught.value.where
    assert caught.value.cure


def test_odd_models_are_all_tried() -> None:
    described = {name for name, each in vars(odd_models).items() if getattr(each, "__module__", "") == "odd_models"}
    assert described == set(ODD) - {"one norm"}
