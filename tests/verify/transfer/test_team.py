"""A run by two processes is the run by one: replicated and sharded, started by torchrun as users start it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from widthwise.derive.errors import DeriveError  # noqa: E402
from widthwise.verify.transfer.command import train_one  # noqa: E402
from widthwise.verify.transfer.config import read_sweep  # noqa: E402
from widthwise.verify.transfer.results import Results  # noqa: E402
from widthwise.verify.transfer.team import Team, joined  # noqa: E402
from widthwise.verify.transfer.train import train  # noqa: E402

LR = 0.05
ROOT = Path(__file__).parents[3]
FILE = """
name = "try"
architecture = "gated_deltanet"
optimizer = "sgd"
base_width = 16
widths = [16, 32]
learning_rates = [0.01]
data = "{text}"
[sizes]
depth = 2
H = 2
d_k = 4
d_v = 8
ffn = 32
[training]
steps = 6
batch = 8
length = 16
accumulate = 2
clip = 0.0
validation = 2
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "text").write_bytes(b"the quick brown fox jumps over the lazy dog; " * 2000)
    (tmp_path / "sweep.toml").write_text(FILE.format(text=tmp_path / "text"))
    return tmp_path / "sweep.toml"


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command = [sys.executable, *launcher, "-m", "widthwise", "train", *map(str, arguments)]
    env = os.environ | {"PYTHONPATH": str(ROOT / "src"), "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize(("strategy", "clip"), [("ddp", 0.0), ("fsdp", 0.0), ("fsdp", 0.1)])
def test_two_processes_train_as_one(file: Path, strategy: str, clip: float) -> None:
    """Under SGD, which sees the size of gradients; and clipped always, which takes the norm of all of them."""
    file.write_text(file.read_text().replace("clip = 0.0", f"clip = {clip}"))
    results = file.parent / "results.jsonl"
    ran = torchrun(file, "--lr", LR, "--strategy", strategy, "--output", results)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("nats a token held out") == 1  # by one of them
    (entry,) = Results(results).load().values()
    assert (entry["processes"], entry["strategy"], entry["width"]) == (2, strategy, 32)
    alone = train(read_sweep(file).run("widthwise", 32, LR, 0))
    assert entry["losses"] == pytest.approx(alone["losses"], abs=2e-4)
    assert entry["loss"] == pytest.approx(alone["loss"], abs=1e-5)
    assert entry["parameters"] == alone["parameters"]
    assert alone["losses"][0] - alone["losses"][-1] > 0.1


def test_processes_share_a_batch() -> None:
    batch = torch.arange(12).view(6, 2)
    shares = [Team(rank, 3).rows(batch) for rank in range(3)]
    assert [len(share) for share in shares] == [2, 2, 2]
    assert torch.equal(torch.cat(shares).sort(0).values, batch)


def test_one_process_is_enough(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_one(file, "widthwise", None, 0.01, 0, "ddp", file.parent / "results.jsonl")
    assert "width 32" in capsys.readouterr().out
    (line,) = (file.parent / "results.jsonl").read_text().splitlines()
    entry: dict[str, Any] = json.loads(line)
    assert entry["key"] == read_sweep(file).run("widthwise", 32, 0.01, 0).key
    assert "processes" not in entry


def test_what_cannot_be_is_named(file: Path) -> None:
    def asked(name: str = "widthwise", width: int = 32, lr: float = 0.01, strategy: str = "ddp") -> None:
        train_one(file, name, width, lr, 0, strategy, None)

    with pytest.raises(DeriveError, match="parametrization is called 'nobody'"):
        asked(name="nobody")
    with pytest.raises(DeriveError, match="must be positive"):
        asked(lr=0.0)
    with pytest.raises(DeriveError, match="strategy is called 'pipeline'"):
        asked(strategy="pipeline")
    with pytest.raises(DeriveError, match="no even shares for 3 processes"):
        train(read_sweep(file).run("widthwise", 32, 0.01, 0), Team(0, 3))
    with joined("fsdp") as team:
        assert team.size == 1


def test_results_that_a_sweep_writes_are_refused_before_training(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("widthwise.verify.transfer.command.train", lambda run, team: pytest.fail("trained"))
    with (
        Results(file.parent / "results.jsonl").claimed(),
        pytest.raises(DeriveError, match="is writing to"),
    ):
        train_one(file, "widthwise", None, 0.01, 0, "ddp", file.parent / "results.jsonl")
