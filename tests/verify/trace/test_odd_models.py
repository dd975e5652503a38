"""What works, and what is refused with the call, its module, its line and a cure."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from traced_models import MLP, WIDTHS, Around, Hidden, around, mlp

from widthwise.derive import architecture, derive
from widthwise.derive.errors import DeriveError
from widthwise.derive.exponents import HALF
from widthwise.derive.graph_toml import read_graph, write_graph
from widthwise.derive.ops import pointwise
from widthwise.derive.ops.registry import OPS, Op, always
from widthwise.verify.trace import trace


def rules(make, optimizer: str = "adamw"):
    return derive(trace(make).graph, optimizer)


class TestWorks:
    def test_dropout_in_training(self) -> None:
        table = rules(around(lambda m, x: m.drop(m.hidden(x).relu()), drop=lambda n: nn.Dropout(0.1)))
        assert table.rule("hidden").lr == -1

    def test_buffers(self) -> None:
        class Buffered(MLP):
            def __init__(self, n: int) -> None:
                super().__init__(n)
                self.register_buffer("mask", torch.ones(6, dtype=torch.bool))

            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x.masked_fill(self.mask, 0.0))

        assert rules(lambda n: (Buffered(n), (torch.zeros(3, 6),))).rule("hidden").lr == -1

    def test_frozen_adapters(self) -> None:
        def make(n: int):
            model = MLP(n)
            for parameter in model.layers.parameters():
                parameter.requires_grad_(False)
            return model, (torch.zeros(3, 6),)

        table = rules(make)
        assert table.rule("hidden").lr is None
        assert table.rule("input").lr == 0

    def test_a_low_rank_adapter_beside_a_frozen_weight(self) -> None:
        def make(n: int):
            def done(m, x):
                return (m.hidden(x) + m.up(m.down(x))).relu()

            model = Around(n, done, down=nn.Linear(n, 4, bias=False), up=nn.Linear(4, n, bias=False))
            model.hidden.requires_grad_(False)
            return model, (torch.zeros(3, 6),)

        table = rules(make)
        assert table.rule("hidden").lr is None
        assert table.rule("down").lr == -1
        assert table.rule("up").lr == 0

    def test_weights_stored_in_out(self) -> None:
        """x @ W, with a factor behind the readout as its multiplier."""

        class InOut(nn.Module):
            def __init__(self, n: int) -> None:
                super().__init__()
                self.first = nn.Linear(6, n, bias=False)
                self.up = nn.Parameter(torch.empty(n, 3 * n))
                self.shift = nn.Parameter(torch.empty(3 * n))
                self.last = nn.Parameter(torch.empty(3 * n, 5))

            def forward(self, x: Tensor) -> Tensor:
                x = torch.addmm(self.shift, self.first(x).relu(), self.up).relu()
                return x @ self.last

        graph = trace(lambda n: (InOut(n), (torch.zeros(3, 6),))).graph
        table = derive(graph)
        assert [str(each) for each in graph.parameters["up"].shape] == ["shift_d0", "width"]
        assert graph.parameters["up"].input_first
        assert (table.rule("up").init_std, table.rule("up").lr) == (-HALF, -1)
        assert (table.rule("last").init_std, table.rule("last").multiplier, table.rule("last").lr) == (0, -1, 0)
        assert read_graph(write_graph(graph)).parameters["up"].input_first

    def test_a_weight_turned(self) -> None:
        """x @ W.T is what nn.Linear computes."""
        graph = trace(around(lambda m, x: x @ m.hidden.weight.T)).graph
        assert not graph.parameters["hidden"].input_first
        assert [node.op for node, _ in graph.consumers("hidden")] == ["linear"]
        assert derive(graph).rule("hidden").lr == -1

    def test_einsum(self) -> None:
        """With a weight it is a linear map, in either order of its axes; a tied readout too. Without, a product."""

        class Einsum(nn.Module):
            def __init__(self, n: int) -> None:
                super().__init__()
                self.embed, self.norm = nn.Embedding(96, n), nn.LayerNorm(n)
                self.q, self.k, self.v, self.o = (nn.Parameter(torch.empty(n, n)) for _ in range(4))

            def forward(self, tokens: Tensor) -> Tensor:
                x = self.embed(tokens)
                h = self.norm(x)
                q, k = (torch.einsum("btd,de->bte", h, each).unflatten(-1, (-1, 16)) for each in (self.q, self.k))
                v = torch.einsum("... d, e d -> ... e", h, self.v).unflatten(-1, (-1, 16))
                weights = (torch.einsum("bihd,bjhd->bhij", q, k) / 4).softmax(-1)
                o = torch.einsum("bhij,bjhd->bihd", weights, v).flatten(-2)
                x = x + torch.einsum("btd,ed->bte", o, self.o)
                return torch.einsum("btd,vd->btv", self.norm(x), self.embed.weight)

        graph = trace(lambda n: (Einsum(n), (torch.zeros(2, 6, dtype=torch.long),))).graph
        assert [graph.parameters[name].input_first for name in "qkvo"] == [True, True, False, False]
        table, described = derive(graph), derive(architecture("transformer", scaling="head-dim-fixed", tied=True))
        for name in "qkvo":
            assert (table.rule(name).init_std, table.rule(name).lr) == (-HALF, -1)
        assert table.rule("embed").init_std == described.rule("embeddings").init_std
        assert table.rule("logits_scale").multiplier == described.rule("lm_head").multiplier

    def test_an_ellipsis_stands_for_the_last_axes_of_the_longer(self) -> None:
        """Gates of [time, features] meet heads of [batch, time, features]."""

        def done(m, x):
            heads, gate = x.unflatten(0, (1, 3)), m.hidden(x)
            return torch.einsum("...d,...d->...d", heads, gate).flatten(0, 1)

        graph = trace(around(done)).graph
        (product,) = (node for node in graph.ordered if node.op == "einsum")
        assert [str(each) for each in product.shape] == ["width"]

    def test_torchs_own_transformer_layer(self) -> None:
        """Its q, k, v are taken one by one from a packed projection: each meets what it should."""

        class Layers(nn.Module):
            def __init__(self, n: int) -> None:
                super().__init__()
                self.embed, self.head = nn.Embedding(96, n), nn.Linear(n, 96, bias=False)
                options = {"batch_first": True, "norm_first": True}
                self.layers = nn.ModuleList(nn.TransformerEncoderLayer(n, n // 16, 4 * n, **options) for _ in range(2))
                self.norm = nn.LayerNorm(n)

            def forward(self, tokens: Tensor) -> Tensor:
                x = self.embed(tokens)
                for layer in self.layers:
                    x = layer(x)
                return self.head(self.norm(x))

        graph = trace(lambda n: (Layers(n), (torch.zeros(2, 6, dtype=torch.long),))).graph
        read = {"scores": {"q", "k"}, "o": {"q", "k", "v"}}
        names = {f"in_proj_weight_{at}": name for at, name in enumerate("qkv")}
        for tensor, wanted in read.items():
            above, waiting = set(), [tensor]
            while waiting:
                for source in graph.makers[waiting.pop()].inputs:
                    above.add(source)
                    waiting += [source] if source in graph.makers else []
            assert {names[each] for each in names.keys() & above} == wanted
        table = derive(graph)
        assert all((table.rule(role).init_std, table.rule(role).lr) == (-HALF, -1) for role in names)

    def test_constants_made_on_no_device(self) -> None:
        def done(m, x):
            places = torch.arange(x.shape[0])
            return m.hidden(x.masked_fill(places[:, None] > 1, 0.0))

        assert rules(around(done)).rule("hidden").lr == -1

    def test_a_layer_used_twice(self) -> None:
        table = rules(around(lambda m, x: m.hidden(m.hidden(x).relu()).relu()))
        assert table.rule("hidden").init_std == -HALF

    def test_an_in_place_nonlinearity(self) -> None:
        table = rules(around(lambda m, x: torch.relu_(m.hidden(x))))
        assert table.rule("hidden").lr == -1

    def test_axes_that_coincide_at_one_width(self) -> None:
        """At width 128 the fixed rank, the batch of features and the width are all 128."""

        def make(n: int):
            model = nn.Sequential(nn.Linear(128, n), nn.ReLU(), nn.Linear(n, 128), nn.ReLU(), nn.Linear(128, 128))
            return model, (torch.zeros(128, 128),)

        shapes = {rule.role: rule for rule in rules(make).rules}
        assert shapes["layer_0"].lr == 0
        assert shapes["layer_2"].lr == -1
        assert shapes["layer_4"].lr == 0

    def test_a_rounded_size_is_said(self) -> None:
        traced = trace(around(lambda m, x: m.back(m.hidden(x)), back=lambda n: nn.Identity()))
        assert not traced.warnings

        def make(n: int):
            ffn = -(-8 * n // 3 // 16) * 16
            return nn.Sequential(nn.Linear(6, n), nn.ReLU(), nn.Linear(n, ffn), nn.ReLU(), nn.Linear(ffn, 5)), (
                torch.zeros(3, 6),
            )

        (warning,) = trace(make).warnings
        assert re.search(
            r"has 352, 432, 608 entries at widths 128, 160, 224: no power of the width; taken as n\^1", warning
        )

    def test_norms_written_out(self) -> None:
        def normed(m, x):
            return m.hidden(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

        def centred(m, x):
            y = x - x.mean(-1, keepdim=True)
            return m.hidden(y / torch.sqrt((y * y).mean(-1, keepdim=True) + 1e-6))

        def length(m, x):
            return m.hidden(nn.functional.normalize(x, dim=-1))

        for done, op in ((normed, "rms_norm"), (centred, "layer_norm"), (length, "l2_norm")):
            graph = trace(around(done)).graph
            assert [node.op for node in graph.nodes if node.op.endswith("norm")] == [op]

    def test_an_own_nonlinearity_with_a_rule(self, monkeypatch: pytest.MonkeyPatch) -> None:
        make = around(lambda m, x: nn.functional.mish(m.hidden(x)))
        with pytest.raises(DeriveError, match=r"aten.mish.default has no rule"):
            trace(make)
        monkeypatch.setitem(
            OPS,
            "mish",
            Op(
                "mish",
                lambda s, a: s[0],
                OPS["silu"].forward,
                OPS["silu"].backward,
                always("absolute"),
                None,
                ("aten.mish",),
            ),
        )
        monkeypatch.setitem(pointwise.NONLINEARITIES, "mish", pointwise.NONLINEARITIES["silu"])
        from widthwise.derive import gaussian

        monkeypatch.setitem(gaussian.FUNCTIONS, "mish", gaussian.FUNCTIONS["silu"])
        assert derive(trace(make).graph).rule("hidden").lr == -1


class Branch(MLP):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = -x
        return super().forward(x)


class Deeper(MLP):
    def __init__(self, n: int) -> None:
        super().__init__(n, depth=n // 32)


class TestRefused:
    def check(self, make, *said: str) -> None:
        with pytest.raises(DeriveError) as caught:
            trace(make, WIDTHS)
        text = str(caught.value)
        for each in said:
            assert re.search(each, text), text

    def test_control_flow_that_depends_on_data(self) -> None:
        self.check(
            lambda n: (Branch(n), (torch.zeros(3, 6),)),
            "torch.export refuses the model at width 128",
            r"test_odd_models.py:\d+",
            "stand-in",
        )

    def test_control_flow_that_depends_on_the_width(self) -> None:
        self.check(lambda n: (Deeper(n), (torch.zeros(3, 6),)), "depth|depending on its width")

    def test_an_op_without_a_rule(self) -> None:
        self.check(
            around(lambda m, x: torch.cumsum(m.hidden(x), -1)),
            r"aten.cumsum.default has no rule",
            r"traced_models.py:\d+",
            "stand_in",
        )

    def test_the_module_is_named(self) -> None:
        class Odd(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return torch.erfinv(x)

        self.check(around(lambda m, x: m.odd(m.hidden(x)), odd=lambda n: Odd()), "aten.erfinv.default in odd")

    def test_aliasing(self) -> None:
        def done(m, x):
            y = m.hidden(x)
            half = y[:, :4]
            y.mul_(2.0)
            return m.last(half) + m.hidden(y)[:, :1]

        self.check(around(done, last=lambda n: nn.Linear(4, n)), "writes into memory", r"x \* a rather than")

    def test_a_weight_on_the_left(self) -> None:
        class Left(nn.Module):
            def __init__(self, n: int) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.empty(n, n))

            def forward(self, x: Tensor) -> Tensor:
                return (self.weight @ x.T).T

        self.check(around(lambda m, x: m.odd(x), odd=Left), "multiplied from the left", "x @ W.T")

    def test_a_weight_used_both_ways(self) -> None:
        def done(m, x):
            return m.hidden(x) @ m.hidden.weight

        self.check(around(done), "hidden.weight transposed, and another call does not")

    def test_what_is_cut_twice(self) -> None:
        """Halves of heads of a packed projection: said with its place."""

        def done(m, x):
            q, _ = m.both(x).chunk(2, -1)
            a, b = q.view(3, -1, 16).chunk(2, -1)
            return m.hidden(torch.cat([-b, a], -1).flatten(1))

        make = around(done, both=lambda n: nn.Linear(n, 2 * n))
        self.check(make, "concatenated again", r"both\.weight", "rotate")

    @pytest.mark.parametrize(
        ("equation", "said"),
        [
            ("td,de->et", "another axis than the last"),
            ("td,dd->td", "takes a diagonal"),
            ("td,de", "with an arrow"),
        ],
    )
    def test_einsums_of_other_kinds(self, equation: str, said: str) -> None:
        def done(m, x):
            y = torch.einsum(equation, x, m.hidden.weight)
            return y if len(y) == len(x) else y.T

        self.check(around(done), said, "aten.einsum")

    def test_a_batch_norm_in_evaluation(self) -> None:
        make = around(lambda m, x: m.norm(m.hidden(x)), norm=lambda n: nn.BatchNorm1d(n).eval())
        self.check(make, "a batch norm in evaluation", "as it trains")

    def test_a_scale_that_follows_no_power(self) -> None:
        self.check(around(lambda m, x: m.hidden(x) * (1 + 1 / x.shape[-1])), "follow no power of the width")

    def test_what_is_no_model(self) -> None:
        self.check(lambda n: None, "return \\(module, example inputs\\)")
        with pytest.raises(DeriveError, match="tell no exponents"):
            trace(mlp, (128,))

    def test_parameters_made_outside(self) -> None:
        """A model that reads values when it is made cannot be made on the meta device."""
        self.check(lambda n: (Hidden(int(torch.ones(1).sum())), ()), "cannot be made at width 128 on the meta device")


TRAIN = """
import torch, traced_models, my_mup

def make_model(width):
    model, _ = traced_models.mlp(width)
    my_mup.init_(model, width=width, base_width=64, seed=torch.initial_seed() % 2**31)
    optimizer = torch.optim.AdamW(my_mup.param_groups(model, lr=1e-3, width=width, base_width=64))
    x, y = torch.randn(16, 6), torch.randint(5, (16,))
    return model, optimizer, lambda model: torch.nn.functional.cross_entropy(model(x), y)
"""


def test_command_line(tmp_path: Path) -> None:
    """All of it, as a user does it."""

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from widthwise.cli import main; main()"
        place = str(Path(__file__).parent)
        return subprocess.run(
            [sys.executable, "-c", code, place, *words], capture_output=True, text=True, cwd=tmp_path, check=False
        )

    done = run("trace", "traced_models:mlp", "--widths", "128", "160", "-o", "model.toml")
    assert done.returncode == 0, done.stderr
    derived = run("derive", "model.toml", "--optimizer", "sgd")
    assert "hidden" in derived.stdout, derived.stderr
    assert run("generate", "model.toml", "-o", "my_mup.py").returncode == 0
    absorbed = ("--optimizer", "adamw", "--gauge", "absorbed")
    assert run("derive", "model.toml", *absorbed, "--format", "toml", "-o", "rules.toml").returncode == 0
    assert run("generate", "model.toml", *absorbed, "-o", "my_mup.py").returncode == 0
    (tmp_path / "my_train.py").write_text(TRAIN, encoding="utf-8")
    told = ("--rules", "rules.toml", "--description", "model.toml", "--seeds", "3", "--no-plot")
    measured = run("coord-check", "my_train:make_model", *told, "--widths", "64", "128", "256")
    assert measured.returncode == 0, measured.stdout + measured.stderr
    assert "hidden in z_hidden" in measured.stdout
    checked = run("check", "my_mup.py")
    assert "0 out of date" in checked.stdout, checked.stdout + checked.stderr
    refused = run("trace", "traced_models:nothing")
    assert refused.returncode == 2
    assert "cannot be imported" in refused.stderr
