"""Sweep files are read with suspicion; runs are what their content says."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch")
import torch
from torch import nn

from widthwise.derive.errors import DeriveError
from widthwise.verify.transfer.config import Run, Sweep, Variant, read_sweep
from widthwise.verify.transfer.train import build, skeleton

CPU = torch.device("cpu")
OLD = "docs/results/transfer/checkpoint.jsonl"
SWEEPS = Path(__file__).parents[3] / "bench" / "transfer"
FILE = """
name = "try"
architecture = "gated_deltanet"
optimizer = "adamw"
base_width = 16
widths = [16, 32]
learning_rates = [0.004, 0.016]
parametrizations = ["standard", "liu-gu-2026", "widthwise"]

[sizes]
depth = 1
H = 2
d_k = 4
d_v = 8
ffn = 32

[training]
steps = 4
batch = 2
length = 16
"""


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    (tmp_path / "sweep.toml").write_text(FILE)
    return read_sweep(tmp_path / "sweep.toml")


def test_the_grid_is_whole_and_small_models_come_first(sweep: Sweep) -> None:
    runs = list(sweep.runs())
    assert len(runs) == len({run.key for run in runs}) == 8  # the base width once
    assert [run.width for run in runs] == [16] * 2 + [32] * 6
    assert {run.base_width for run in runs if run.parametrization == "standard"} == {16, 32}
    assert {run.base_width for run in runs if run.parametrization != "standard"} == {16}


def test_a_key_is_what_a_run_is(sweep: Sweep) -> None:
    runs = list(sweep.runs())
    assert [run.key for run in runs] == [run.key for run in sweep.runs()]
    assert replace(runs[0], seed=1).key != runs[0].key
    assert replace(runs[0], rules="sha256:other").key != runs[0].key
    assert replace(runs[0], lr_multipliers={"o_proj": 0.5}).key != runs[0].key
    assert replace(runs[0], training=replace(runs[0].training, clip=0.5)).key != runs[0].key
    assert replace(runs[0], training=replace(runs[0].training, norm_eps=1e-3)).key != runs[0].key


def test_a_setting_that_came_later_is_no_other_run_where_it_is_not_used(sweep: Sweep) -> None:
    """Results from before ``norm_eps`` was there are known again."""
    recorded = {json.loads(line)["key"] for line in (SWEEPS.parents[1] / OLD).read_text().splitlines()}
    assert recorded <= {run.key for run in read_sweep(SWEEPS / "checkpoint.toml").runs()}


def test_what_a_derivation_says_besides_is_no_other_run(sweep: Sweep) -> None:
    """AdamW's knobs are the same under these two sets, and what the tables say of themselves is not."""
    other = replace(sweep, variants={"other": Variant(assume="largest-channel")})
    here, there = (other.run(name, 32, 0.004, 0) for name in ("widthwise", "other"))
    assert here.rules == there.rules
    assert here.request.table().hash != there.request.table().hash


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('name = "try"', "", "lacks name"),
        ("steps = 4", 'steps = "4"', "steps cannot be '4'"),
        ("steps = 4", "steps = true", "steps cannot be True"),
        ("steps = 4", "steps = 0", "must be positive"),
        ("batch = 2", "batch = 3\naccumulate = 2", "multiple of accumulate"),
        ("length = 16", "length = 16\nlenght = 3", "lenght"),
        ("length = 16", "length = 16\nnorm_eps = -1e-3", "norm_eps must be a number"),
        ("length = 16", "length = 16\nnorm_eps = nan", "norm_eps must be a number"),
        ("length = 16", "length = 16\nnorm_eps = inf", "norm_eps must be a number"),
        ("length = 16", "length = 16\nclip = -1", "clip is -1, and must be at least 0"),
        ("length = 16", "length = 16\nmomentum = 1.5", "momentum is 1.5, and must be between 0 and 1"),
        ("length = 16", "length = 16\nweight_decay = nan", "weight_decay is nan"),
        ("length = 16", "length = 16\nwarmup = 5", "warmup is 5, and must be between 0 and 4"),
        ("length = 16", "length = 16\nvalidation = 0", "validation is 0, and must be at least 1"),
        ("[0.004, 0.016]", "[]", "it is a list with something in it"),
        ('"widthwise"]', '"wide"]', "no parametrization of .* is called 'wide' → known: .*standard.*, widthwise"),
        ("[training]", "[variants.ours]\nregime = 'asymptotic'\n[training]", "variant ours is none of its param"),
        ("widths = [16, 32]", "widths = [32]", "lack the base width 16"),
        ("widths = [16, 32]", "widths = [16, 16]", "not different"),
        ("widths = [16, 32]", "widths = []", r"widths cannot be \[\]"),
        ("[0.004, 0.016]", "[0.0, 0.016]", "must be positive"),
        ("[training]", "[[grids]]\nwidths = [8]\n[training]", "width 8 of a grid is none of the sweep's"),
        ("[training]", "[[grids]]\naround = 1.0\n[training]", "no grid begins"),
        ("[training]", '[[grids]]\nparametrizations = ["ntk"]\n[training]', "parametrization ntk of a grid"),
        ("[training]", "[variants.ours]\nregim = 'asymptotic'\n[training]", "regim"),
        ("[training]", "[training]\ngraph = 1", "graph cannot be 1"),
        ("[training]", "[trainning]", r"no \[training\]"),
        ("[training]", "[training", "is not TOML"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, old: str, new: str, says: str) -> None:
    assert old in FILE
    (tmp_path / "sweep.toml").write_text(FILE.replace(old, new))
    with pytest.raises(DeriveError, match=says):
        read_sweep(tmp_path / "sweep.toml")


def test_grids_are_parts_of_a_sweep(tmp_path: Path) -> None:
    more = """
    [variants.early]
    regime = "practical"
    fix = ["a_proj.init_std=-1/2"]
    [variants.other]
    options = ["qk_scale=d_k^-1/2"]
    [variants.third]
    options = ["qk_scale=d_k^-1/2"]
    fix = ["o_scale.multiplier=0"]
    [[grids]]
    widths = [16]
    seeds = [0, 1]
    [[grids]]
    parametrizations = ["early", "other"]
    learning_rates = [0.004]
    """
    text = FILE.replace('"liu-gu-2026", "widthwise"', '"early", "other", "third"')
    (tmp_path / "sweep.toml").write_text(text + more)
    runs = list(read_sweep(tmp_path / "sweep.toml").runs())
    at_base = [(run.parametrization, run.lr, run.seed) for run in runs if run.width == 16]
    # Options make another model, with a base of its own; whatever else is changed, the base is the same.
    assert sorted(at_base) == [
        (name, lr, seed) for name in ("other", "standard") for lr in (0.004, 0.016) for seed in (0, 1)
    ]
    wider = {run.parametrization: run for run in runs if run.width == 32}
    assert len(runs) - len(at_base) == len(wider) == 2
    assert wider["early"].request.fix == ("a_proj.init_std=-1/2",)
    assert wider["other"].request.options == ("qk_scale=d_k^-1/2",)


MULTIPLIED = """
[variants.slow-mlp]
lr_multipliers = { gate_proj = 0.5, up_proj = 0.5, down_proj = 0.5 }
[variants.late]
regime = "asymptotic"
lr_multipliers = { down_proj = 0.5, gate_proj = 0.5, up_proj = 0.5 }
[variants.none]
lr_multipliers = {}
"""


def test_learning_rates_multiplied_by_role_are_hyperparameters_of_the_base_too(tmp_path: Path) -> None:
    text = FILE.replace('"liu-gu-2026", "widthwise"', '"widthwise", "slow-mlp", "late", "none"')
    (tmp_path / "sweep.toml").write_text(text + MULTIPLIED)
    sweep = read_sweep(tmp_path / "sweep.toml")
    runs = list(sweep.runs())
    # The base is tuned anew, once for all rules of these multipliers, and other runs keep their keys.
    assert [run.parametrization for run in runs if run.width == 16] == ["slow-mlp", "standard"] * 2
    plain = replace(sweep, variants={"none": Variant()}, parametrizations=("standard", "widthwise", "none"))
    assert {run.key for run in plain.runs()} == {run.key for run in runs if not run.lr_multipliers}
    for width in sweep.widths:
        mine, theirs = ({group["name"]: group["lr"] for group in build(run, CPU)[1]} for run in pair(sweep, width))
        changed = {name: lr / theirs[name] for name, lr in mine.items() if lr != theirs[name]}
        assert changed == {"gate_proj": 0.5, "up_proj": 0.5, "down_proj": 0.5}


def test_learning_rates_of_roles_that_there_are_not_and_of_no_size(tmp_path: Path) -> None:
    text = FILE.replace('"liu-gu-2026"', '"other"') + "[variants.other]\n"
    (tmp_path / "sweep.toml").write_text(text + "lr_multipliers = { gate = 0.5 }")
    with pytest.raises(DeriveError, match="no role is called 'gate'"):
        skeleton(read_sweep(tmp_path / "sweep.toml").run("other", 32, 0.004, 0))
    (tmp_path / "sweep.toml").write_text(text + "lr_multipliers = { o_proj = 0 }")
    with pytest.raises(DeriveError, match="lr_multipliers of other must be positive"):
        read_sweep(tmp_path / "sweep.toml")


def pair(sweep: Sweep, width: int) -> tuple[Run, Run]:
    """One run with multipliers of learning rates, and the same without."""
    run = sweep.run("slow-mlp", width, 0.004, 0)
    return run, replace(run, lr_multipliers={})


def test_a_preset_that_there_is_not(sweep: Sweep) -> None:
    with pytest.raises(DeriveError, match="preset"):
        list(replace(sweep, parametrizations=("nobody-2026",)).runs())


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DeriveError, match="cannot read"):
        read_sweep(tmp_path / "sweep.toml")


@pytest.mark.parametrize("file", sorted(SWEEPS.glob("*.toml")), ids=lambda file: file.stem)
def test_committed_sweeps_say_what_can_be_run(file: Path) -> None:
    sweep = read_sweep(file)
    middle = sorted(sweep.learning_rates)[len(sweep.learning_rates) // 2]
    runs = [run for stage in sweep.stages(dict.fromkeys(sweep.parametrizations, middle)) for run in stage]
    assert {run.width for run in runs} == set(sweep.widths)
    for width in sweep.widths:  # at least seven learning rates a curve, but where roles are only compared
        rates = {run.lr for run in runs if run.width == width and run.parametrization == sweep.parametrizations[0]}
        assert len(rates) >= (5 if file.stem.startswith("sgd-roles") else 7)


def test_every_norm_of_the_model_has_the_eps_that_is_asked_for(sweep: Sweep) -> None:
    def epsilons(norm_eps: float | None) -> set[float]:
        run = next(iter(replace(sweep, training=replace(sweep.training, norm_eps=norm_eps)).runs()))
        return {module.eps for module in skeleton(run).modules() if isinstance(module, nn.RMSNorm)}

    assert epsilons(3e-3) == {3e-3}
    assert epsilons(None) == {1e-5}


def test_a_graph_of_ones_own_is_asked_for_no_scaling_that_it_may_not_have(sweep: Sweep) -> None:
    def scaling(architecture: str) -> str | None:
        return replace(sweep, architecture=architecture)._request("widthwise").scaling

    assert (scaling("gated_deltanet"), scaling("mlp"), scaling("mine:graph")) == ("heads-fixed", None, None)
