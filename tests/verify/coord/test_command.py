"""``widthwise coord-check`` as it is typed: files, exit codes, and what goes wrong in somebody's hands."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from widthwise.cli import cli
from widthwise.verify.coord import command as module

FACTORY = """
import torch
from torch import nn


class MLP(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.input = nn.Linear(8, n)
        self.layers = nn.ModuleList([nn.ModuleDict({"hidden": nn.Linear(n, n)})])
        self.output = nn.Linear(n, 4, bias=False)

    def forward(self, x):
        x = torch.relu(self.input(x))
        for layer in self.layers:
            x = torch.relu(layer["hidden"](x))
        return self.output(x)


def loss(model):
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    return nn.functional.cross_entropy(model(x), torch.arange(32) % 4)


def make_model(width, power=-1, optimizer=torch.optim.AdamW):
    model, by = MLP(width), width / 64
    for name, parameter in model.named_parameters():
        std = 0 if "bias" in name else parameter.shape[1] ** -0.5 * (by**-0.5 if name == "output.weight" else 1)
        nn.init.normal_(parameter, std=std)
    rate = {"layers.0.hidden.weight": by**power, "output.weight": by**power}
    groups = [{"params": [p], "lr": 1e-3 * rate.get(name, 1)} for name, p in model.named_parameters()]
    return model, optimizer(groups), loss


def wrong(width):
    return make_model(width, power=0)


def other_optimizer(width):
    return make_model(width, optimizer=torch.optim.NAdam)


def compiled(width):
    model, optimizer, loss = make_model(width)
    return torch.compile(model), optimizer, loss


def closure(width):
    return make_model(width, optimizer=lambda groups: torch.optim.LBFGS([p for g in groups for p in g["params"]]))


def diverging(width):
    model, optimizer, loss = make_model(width)
    for group in optimizer.param_groups:
        group["lr"] = 1e30
    return model, optimizer, loss


def careless(width):
    return make_model(64)


def no_loss(width):
    return make_model(width)[0]


def broken(width):
    return *make_model(width)[:2], lambda model: model(torch.zeros(3, 7)).sum()


def vector(width):
    return *make_model(width)[:2], lambda model: model(torch.zeros(3, 8)).sum(0)


class Stuck(torch.optim.SGD):
    def step(self, closure=None):
        raise RuntimeError("no step today")


def stuck(width):
    return make_model(width, optimizer=Stuck)
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run the check on a factory of somebody's, in their folder."""
    monkeypatch.chdir(tmp_path)
    name = f"pkg_{abs(hash(tmp_path))}"  # a module of its own for each test
    Path(f"{name}.py").write_text(FACTORY, encoding="utf-8")
    rules = CliRunner().invoke(cli, ["derive", "mlp", "--gauge", "absorbed", "--format", "toml"])
    Path("rules.toml").write_text(rules.output, encoding="utf-8")

    def run(factory: str, *options: str) -> Result:
        words = ["coord-check", f"{name}:{factory}", "--rules", "rules.toml", "--widths", "64", "128", "256"]
        return CliRunner().invoke(cli, [*words, "--seeds", "6", *options])

    return run


@pytest.mark.parametrize("factory", ["make_model", "other_optimizer", "compiled"])
def test_a_factory_that_follows_its_rules_passes(mine: Callable[..., Result], factory: str) -> None:
    ran = mine(factory, "--no-plot")
    assert ran.exit_code == 0, ran.output
    assert "a factory of yours" in ran.output
    assert json.loads(Path("coord_check.json").read_text(encoding="utf-8"))["passed"]


def test_one_that_does_not_fails_in_words_and_pictures(mine: Callable[..., Result]) -> None:
    pytest.importorskip("matplotlib")
    ran = mine("wrong")
    assert ran.exit_code == 1, ran.output
    assert "hidden steps as n^" in ran.output
    assert "learning rate is n^1.0" in ran.output
    assert Path("coord_check.png").exists()


@pytest.mark.parametrize(
    ("factory", "told"),
    [
        ("diverging", "is not finite (change, width 64, step 1)"),
        ("careless", "the models of width 64 and 128 have the same shapes"),
        ("no_loss", "a model without an embedding takes no tokens"),
        ("broken", "failed: RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
        ("vector", "is a tensor [4] to do: let it return a scalar tensor"),
        ("stuck", "Stuck.step() failed: RuntimeError: no step today"),
        ("missing", "has no attribute 'missing'"),
    ],
)
def test_what_cannot_be_checked_says_why(mine: Callable[..., Result], factory: str, told: str) -> None:
    ran = mine(factory)
    assert ran.exit_code == 2, ran.output
    assert told in " ".join(ran.output.split())
    assert not Path("coord_check.json").exists()


def test_an_optimizer_that_evaluates_the_loss_itself_is_given_a_way_to(mine: Callable[..., Result]) -> None:
    ran = mine("closure", "--no-plot")
    assert ran.exit_code in (0, 1), ran.output
    assert Path("coord_check.json").exists()


@pytest.mark.parametrize("options", [[], ["--tied"], ["--optimizer", "sgd", "--scaling", "head-dim-fixed"]])
def test_a_generated_model_in_the_absorbed_gauge(tmp_path: Path, options: list[str]) -> None:
    words = ["coord-check", "gated_deltanet", "--gauge", "absorbed", "--seeds", "6", "--no-plot", "-o", str(tmp_path)]
    ran = CliRunner().invoke(cli, [*words, *options])
    assert ran.exit_code == 0, ran.output
    assert "the generated model" in ran.output
    assert "absorbed gauge" in ran.output


def test_alignment_says_which_assumptions_hold_and_from_where_others_would() -> None:
    ran = CliRunner().invoke(cli, ["coord-check", "gated_deltanet", "--alignment", "--seeds", "3", "--steps", "1"])
    assert ran.exit_code == 0, ran.output
    assert "so it obeys: at-init" in ran.output
    assert "n ≈" in ran.output
    assert "own step: 11 coherent" in " ".join(ran.output.split())


@pytest.mark.parametrize("more", [[], ["--graph"]])
@pytest.mark.parametrize(
    ("scaling", "assume"), [("heads-fixed", "largest-channel"), ("head-dim-fixed", "carrying-channel")]
)
def test_powers_of_a_logarithm_are_taken_out(more: list[str], scaling: str, assume: str, tmp_path: Path) -> None:
    """Of steps over their gradients learning rates are left, whose powers of n have no error."""
    words = f"coord-check gated_deltanet --optimizer sgd --scaling {scaling} --assume {assume} --regime throughout"
    options = ["--seeds", "8", "--steps", "1", "--no-plot", "-o", str(tmp_path)]
    ran = CliRunner().invoke(cli, [*words.split(), *options, *more])
    assert ran.exit_code == 0, ran.output
    results = json.loads((tmp_path / "coord_check.json").read_text())["results"]
    steps = [each for each in results if each["kind"] == "step"]
    assert {"q_proj", "o_proj", "up_proj"} < {each["name"] for each in steps}
    assert all(abs(each["slope"]["value"] - each["predicted"]) < 0.02 for each in steps)


def test_alignment_of_rules_with_powers_of_a_logarithm() -> None:
    words = "coord-check gated_deltanet --optimizer sgd --assume largest-channel --alignment --seeds 2 --steps 1"
    ran = CliRunner().invoke(cli, words.split())
    assert ran.exit_code == 0, ran.output


@pytest.mark.parametrize(
    ("options", "seeds", "steps"),
    [([], 10, 2), (["--thorough"], 40, 4), (["--thorough", "--seeds", "3", "--steps", "1"], 3, 1)],
)
def test_thorough_is_more_seeds_and_steps(
    monkeypatch: pytest.MonkeyPatch, options: list[str], seeds: int, steps: int
) -> None:
    class Seen(Exception):
        pass

    def seen(*args: Any, **given: Any) -> None:
        raise Seen(len(given["seeds"]), given["steps"])

    monkeypatch.setattr(module, "coordinate_check", seen)
    ran = CliRunner().invoke(cli, ["coord-check", "mlp", "--no-plot", *options])
    assert isinstance(ran.exception, Seen), ran.output
    assert ran.exception.args == (seeds, steps)


@pytest.mark.gpu
def test_a_gpu_is_used_where_there_is_one(tmp_path: Path) -> None:
    before = torch.cuda.max_memory_allocated()
    words = "coord-check gated_deltanet --graph --no-plot -o"
    ran = CliRunner().invoke(cli, [*words.split(), str(tmp_path)])
    assert ran.exit_code == 0, ran.output
    assert torch.cuda.max_memory_allocated() > before
