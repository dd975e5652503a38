"""Sweeps survive what happens to them: kills, full disks, bad data, short memory, divergence."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
from click.testing import CliRunner

from widthwise.cli import cli
from widthwise.derive.errors import DeriveError
from widthwise.verify.transfer import execute, train
from widthwise.verify.transfer.config import Grid, Run, Sweep, read_sweep
from widthwise.verify.transfer.results import Results
from widthwise.verify.transfer.sweep import carry_out

ROOT = Path(__file__).parents[3]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "text").write_bytes(b"the quick brown fox jumps over the lazy dog; " * 2000)
    (tmp_path / "sweep.toml").write_text(
        f"""
name = "try"
architecture = "gated_deltanet"
optimizer = "adamw"
base_width = 16
widths = [16, 32]
learning_rates = [0.004, 0.016]
data = "{tmp_path}/text"
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
validation = 1
"""
    )
    return tmp_path


@pytest.fixture
def sweep(folder: Path) -> Sweep:
    return read_sweep(folder / "sweep.toml")


def run(*arguments: object) -> Any:
    return CliRunner().invoke(cli, [str(each) for each in arguments])


def test_a_sweep_runs_once_and_reports(folder: Path) -> None:
    result = run("sweep", folder / "sweep.toml")
    assert result.exit_code == 0, result.output
    assert len(Results(folder / "sweep.jsonl").load()) == 6
    before = (folder / "sweep.jsonl").read_bytes()
    again = run("sweep", folder / "sweep.toml")
    assert "6 runs, 6 of them finished before" in again.output
    assert (folder / "sweep.jsonl").read_bytes() == before
    assert run("plot", folder / "sweep.jsonl", "--markdown").output.count("| widthwise | 32 |") == 1
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_to_plot_is_said(folder: Path, sweep: Sweep) -> None:
    results = folder / "results.jsonl"
    results.touch()
    assert "holds no finished run" in run("plot", results).output
    for each in sweep.runs():
        Results(results).add(each, {"loss": None, "diverged": 3})
    result = run("plot", results)
    assert result.exit_code == 2
    assert "no run to plot that did not diverge" in result.output
    assert run("plot", results, "--markdown").output.count("| all diverged |") == 4


def test_a_picture_that_cannot_be_made_fails_no_sweep(folder: Path) -> None:
    (folder / "sweep.png").mkdir()
    result = run("sweep", folder / "sweep.toml")
    assert result.exit_code == 0, result.output
    assert "no picture: cannot write" in result.output


def test_equal_runs_have_equal_losses_and_the_base_width_is_common(sweep: Sweep) -> None:
    runs = {(each.parametrization, each.width, each.lr): each for each in sweep.runs()}
    at_base = runs["standard", 16, 0.004]
    one = train.train(at_base)["loss"]
    assert one == train.train(at_base)["loss"]
    for name in ("widthwise", "liu-gu-2026"):
        other = next(run for run in replace(sweep, parametrizations=(name,)).runs())
        assert (other.parametrization, other.width, other.lr) == (name, 16, 0.004)
        assert one == train.train(other)["loss"]
    assert one != train.train(replace(at_base, seed=1))["loss"]


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_killed_sweep_goes_on(folder: Path, jobs: int) -> None:
    text = (folder / "sweep.toml").read_text().replace("steps = 4", "steps = 40")
    (folder / "sweep.toml").write_text(text)
    command = [sys.executable, "-m", "widthwise", "sweep", str(folder / "sweep.toml"), "--jobs", str(jobs)]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT / "src")}, stdout=subprocess.DEVNULL)
    results = folder / "sweep.jsonl"
    until = time.monotonic() + 120
    while not (results.exists() and results.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = Results(results).load()
    with results.open("ab") as file:
        file.write(b'{"key": "cut sho')  # as a kill in the middle of a line would leave it
    assert Results(results).load() == finished
    assert run("sweep", folder / "sweep.toml").exit_code == 0
    after = Results(results).load()
    assert len(after) == 6
    assert finished.items() <= after.items()
    assert all(json.loads(line) for line in results.read_text().splitlines())


def test_a_full_disk_loses_nothing(folder: Path, sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "sweep.jsonl"
    results, runs = Results(path), list(sweep.runs())
    outcome = {"loss": 1.0, "diverged": None}
    results.add(runs[0], outcome)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DeriveError, match="No space left on device"):
        results.add(runs[1], outcome)
    assert path.read_bytes() == before


def test_a_line_that_a_full_disk_cuts_short_is_taken_back(folder: Path) -> None:
    """The system itself refuses to write on, in the middle of the second or third line."""
    command = [sys.executable, "-m", "widthwise", "sweep", str(folder / "sweep.toml"), "--no-plot"]
    limit = "import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (2500, 2500)); "
    limit += "os.execv(sys.argv[1], sys.argv[1:])"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    stopped = subprocess.run([sys.executable, "-c", limit, *command], env=environment, capture_output=True, text=True)
    assert stopped.returncode == 2, stopped.stderr
    assert "sweep.jsonl: No space left on device" in stopped.stderr
    assert "what was finished is kept" in stopped.stderr
    before = (folder / "sweep.jsonl").read_bytes()
    assert before.endswith(b"\n")
    assert 1 <= len(Results(folder / "sweep.jsonl").load()) < 6
    assert run("sweep", folder / "sweep.toml").exit_code == 0
    assert (folder / "sweep.jsonl").read_bytes().startswith(before)
    assert len(Results(folder / "sweep.jsonl").load()) == 6


def test_two_sweeps_do_not_write_one_file(folder: Path) -> None:
    """The second is refused at once, in another process too; a sweep with nothing left writes nothing and is not."""
    command = [sys.executable, "-m", "widthwise", "sweep", str(folder / "sweep.toml"), "--no-plot"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    with Results(folder / "sweep.jsonl").claimed():
        refused = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert refused.returncode == 2
        assert "is writing to" in " ".join(refused.stderr.split())
        assert "Traceback" not in refused.stderr
    subprocess.run(command, env=environment, capture_output=True, check=True)
    with Results(folder / "sweep.jsonl").claimed():
        subprocess.run(command, env=environment, capture_output=True, check=True)


def test_what_another_sweep_finished_before_the_claim_is_not_trained_again(
    folder: Path, sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results are read, then claimed: here another sweep finishes in between."""
    claimed, path = Results.claimed, folder / "sweep.jsonl"
    asked: list[str] = []

    def late(results: Results) -> Any:
        for each in sweep.runs():
            Results(path).add(each, {"loss": 1.0, "diverged": None, "seconds": 1.0})
        return claimed(results)

    monkeypatch.setattr(train, "train", lambda run: asked.append(run.key) or {})
    monkeypatch.setattr(Results, "claimed", late)
    assert carry_out([(sweep, path)]) == []
    assert asked == []
    assert len(path.read_bytes().splitlines()) == 6


def test_a_claim_is_on_the_file_that_is_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on one that its last claimant took away, empty, after it was opened here."""
    path, opened = folder / "sweep.jsonl", Results._open

    def slow(results: Results) -> Any:
        file = opened(results)
        if not taken:
            taken.append(path.unlink())
        return file

    taken: list[None] = []
    monkeypatch.setattr(Results, "_open", slow)
    with Results(path).claimed(), pytest.raises(DeriveError, match="another sweep"), Results(path).claimed():
        pass
    assert not path.exists()


def test_a_claim_leaves_others_files_alone(folder: Path) -> None:
    path = folder / "sweep.jsonl"
    with Results(path).claimed():
        path.unlink()
    with Results(path).claimed():
        path.unlink()
        path.touch()
    assert path.exists()


def test_two_sweeps_of_one_command_do_not_share_a_file(folder: Path) -> None:
    (folder / "more").mkdir()
    (folder / "more" / "sweep.toml").write_text((folder / "sweep.toml").read_text().replace('"try"', '"more"'))
    result = run("sweep", folder / "sweep.toml", folder / "more" / "sweep.toml", "--output", folder)
    assert result.exit_code == 2
    said = " ".join(result.output.split())
    assert "two of the sweeps, 'try' and 'more', would write to" in said
    assert "another sweep" not in said


def test_an_edited_sweep_tells_its_own_runs_and_a_plot_mixes_none(folder: Path) -> None:
    text = (folder / "sweep.toml").read_text()
    first = run("sweep", folder / "sweep.toml", "--no-plot").output.partition("\n")[2]
    (folder / "sweep.toml").write_text(text.replace("steps = 4", "steps = 6"))
    edited = run("sweep", folder / "sweep.toml", "--no-plot").output
    assert "6 runs, 0 of them finished before" in edited
    mixed = run("plot", folder / "sweep.jsonl")
    assert mixed.exit_code == 2
    assert "has runs that differ in training.steps: one table would mix them" in mixed.output
    (folder / "sweep.toml").write_text(text)
    again = run("sweep", folder / "sweep.toml", "--no-plot").output
    assert again[again.index("┏") :] == first[first.index("┏") :] != edited[edited.index("┏") :]


def test_a_picture_of_a_kind_that_there_is_not(folder: Path) -> None:
    assert run("sweep", folder / "sweep.toml", "--no-plot").exit_code == 0
    result = run("plot", folder / "sweep.jsonl", "--output", folder / "sweep.xyz")
    assert result.exit_code == 2
    assert "give a file name that ends in .png" in result.output


def test_what_was_stopped_is_not_called_failed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(asked: Run) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train", stopped)
    result = run("sweep", folder / "sweep.toml")
    assert result.exit_code == 1
    assert "stopped; the same command goes on from here" in result.output
    assert "failed" not in result.output


def test_results_that_are_none_are_refused(folder: Path) -> None:
    (folder / "sweep.jsonl").write_text('{"key": "a"}\nnot a result\n')
    result = run("sweep", folder / "sweep.toml")
    assert result.exit_code == 2
    assert "line 2 of" in result.output


def test_a_corpus_that_cannot_be_read_fails_its_runs_and_says_so(folder: Path) -> None:
    (folder / "sweep.toml").write_text((folder / "sweep.toml").read_text().replace("/text", "/nothing"))
    result = run("sweep", folder / "sweep.toml", "--output", folder / "results.jsonl")
    assert result.exit_code == 1
    assert result.output.count("does not exist") == 1
    assert result.output.count(": the same\n") == 5
    assert "6 runs failed; the same command tries again" in result.output
    assert not (folder / "results.jsonl").exists()


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("H = 2\n", "heads = 2\n", "unexpected keyword argument 'heads'\n  to do: it takes depth, H, d_k, d_v, ffn\n"),
        ("H = 2\n", "", "missing 1 required keyword-only argument: 'H'"),
        (
            '"adamw"',
            '"lion"',
            "no optimizer that sweeps can train with is called 'lion'\n  to do: known: adam, adamw, sgd",
        ),
        ('"gated_deltanet"', '"mamba2"', "no kernel computes the scan"),
    ],
)
def test_what_is_wrong_with_all_runs_is_said_once(folder: Path, old: str, new: str, says: str) -> None:
    file = folder / "sweep.toml"
    file.write_text(file.read_text().replace(old, new))
    result = run("sweep", file)
    assert result.exit_code == 2
    assert says in result.output
    assert "failed" not in result.output
    assert not (folder / "sweep.jsonl").exists()


def test_short_memory_fails_one_run(folder: Path, sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    def attempt(asked: Run) -> dict[str, Any]:
        if asked.width == 32 and asked.lr == 0.016:
            raise RuntimeError("CUDA out of memory. Tried to allocate")
        return {"loss": 1.0, "diverged": None, "seconds": 1.0}

    monkeypatch.setattr(train, "train", attempt)
    failures = carry_out([(sweep, folder / "results.jsonl")])
    assert len(failures) == 2
    assert "out of memory: run fewer at a time" in failures[0]
    assert len(Results(folder / "results.jsonl").load()) == 4


def test_sweeps_share_runs_and_each_has_its_own_results(
    folder: Path, sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def attempt(run: Run) -> dict[str, Any]:
        asked.append(run.key)
        return {"loss": 1.0, "diverged": None, "seconds": 1.0}

    monkeypatch.setattr(train, "train", attempt)
    narrow = replace(sweep, parametrizations=("standard",))
    files = folder / "one.jsonl", folder / "two.jsonl"
    assert carry_out([(narrow, files[0])]) == []
    assert carry_out([(narrow, files[0]), (sweep, files[1])]) == []
    assert len(asked) == len(set(asked)) == 6
    one, two = (Results(file).load() for file in files)
    assert one.items() <= two.items()
    assert (len(one), len(two)) == (4, 6)


def test_several_files_write_into_one_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note = {"note": "no CUDA graph, which is slower: because"}
    outcome = {"loss": 1.0, "diverged": None, "seconds": 1.0, "parameters": 1, "step_seconds": 1.0}
    monkeypatch.setattr(train, "train", lambda run: outcome | note)
    (folder / "again.toml").write_text((folder / "sweep.toml").read_text())
    result = run("sweep", folder / "sweep.toml", folder / "again.toml", "--output", folder / "results")
    assert result.exit_code == 0, result.output
    assert result.output.count("note: no CUDA graph, which is slower: because") == 1  # for all runs
    one, two = (Results(folder / "results" / f"{name}.jsonl").load() for name in ("sweep", "again"))
    assert one == two
    assert len(one) == 6


def test_optima_beyond_the_grid_are_looked_for(folder: Path, sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    """Down to where they are, or as far as was allowed; the transferred learning rate is always among the rates run."""

    def attempt(run: Run) -> dict[str, Any]:
        at = math.log2(run.lr) + (2 if run.width == 16 else 9)  # optimum at 2^-2 at the base width, else at 2^-9
        return {"loss": at**2, "diverged": None, "seconds": 1.0}

    monkeypatch.setattr(train, "train", attempt)
    wide = replace(sweep, parametrizations=("widthwise",), learning_rates=(2.0**-5, 2.0**-4), extend=3)
    assert carry_out([(wide, folder / "results.jsonl")]) == []
    entries = Results(folder / "results.jsonl").load().values()
    rates = {width: sorted(math.log2(e["lr"]) for e in entries if e["width"] == width) for width in (16, 32)}
    assert rates == {16: [-5, -4, -3, -2, -1], 32: [-8, -7, -6, -5, -4, -2]}
    before = len(entries)
    assert carry_out([(wide, folder / "results.jsonl")]) == []
    assert len(Results(folder / "results.jsonl").load()) == before


def test_a_grid_around_the_optimum_waits_for_the_base_width(
    folder: Path, sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, float]] = []

    def attempt(run: Run) -> dict[str, Any]:
        asked.append((run.width, math.log2(run.lr)))
        return {"loss": (math.log2(run.lr) + 6) ** 2, "diverged": None, "seconds": 1.0}

    monkeypatch.setattr(train, "train", attempt)
    rates = tuple(2.0**power for power in range(-9, 1))
    grids = (Grid(widths=(32,), parametrizations=("widthwise",), around=1.0), Grid(widths=(16,)))
    centered = replace(sweep, learning_rates=rates, grids=grids)
    assert carry_out([(centered, folder / "results.jsonl")]) == []
    assert asked == [(16, power) for power in range(-9, 1)] + [(32, power) for power in (-7, -6, -5)]
    assert carry_out([(centered, folder / "results.jsonl")]) == []
    assert len(asked) == 13


def test_divergence_is_recorded(sweep: Sweep) -> None:
    outcome = train.train(replace(next(sweep.runs()), lr=1e30))
    assert outcome["diverged"] is not None
    assert outcome["loss"] is None


@pytest.mark.parametrize("how", ["local", "ray"])
def test_several_at_a_time_give_the_same(folder: Path, sweep: Sweep, how: str, request: pytest.FixtureRequest) -> None:
    if how == "ray":
        request.getfixturevalue("cluster")
    runs = [each for each in sweep.runs() if each.parametrization == "widthwise"]
    outcomes = {each.key: outcome for each, outcome in execute.executor(how)(runs, 2)}
    assert {each.key for each in runs} == set(outcomes)
    assert outcomes[runs[0].key]["loss"] == train.train(runs[0])["loss"]


def test_a_node_that_is_lost_loses_no_run(folder: Path, sweep: Sweep, cluster: Any) -> None:
    long = replace(sweep, training=replace(sweep.training, steps=60), parametrizations=("widthwise",))
    done = []
    for outcome in execute.ray(list(long.runs()), 2):
        if not done:
            cluster.remove_node(next(node for node in cluster.list_all_nodes() if node is not cluster.head_node))
        done.append(outcome)
    assert len(done) == 4
    assert all(outcome["loss"] > 0 for _, outcome in done)


@pytest.fixture
def cluster() -> Any:
    """Two Ray nodes on this machine."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    made.add_node(num_cpus=1)
    path = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    ray.init(address=made.address, runtime_env={"env_vars": {"PYTHONPATH": path}})
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.mark.parametrize("task", ["mqar", "mqar-mixed"])
def test_recall_can_be_learned_from_the_sequence_alone(task: str) -> None:
    from widthwise.verify.transfer import mqar

    tokens, targets = next(mqar.batches(16, 33, seed=0, **mqar.TASKS[task]))
    assert tokens.shape == targets.shape == (16, 33)
    counts = []
    for row, answers in zip(tokens, targets, strict=True):
        asked = (answers != mqar.IGNORED).nonzero().flatten().tolist()
        counts.append(len(asked))
        start = 33 - 4 * len(asked)
        assert asked == list(range(33 - 2 * len(asked), 33, 2))
        keys = row[start : asked[0] : 2].tolist()
        pairs = dict(zip(keys, row[start + 1 : asked[0] : 2].tolist(), strict=True))
        assert sorted(int(row[place]) for place in asked) == sorted(set(keys))
        assert all(pairs[int(row[place])] == int(answers[place]) for place in asked)
        assert all(int(row[place + 1]) == int(answers[place]) for place in asked[:-1])
    assert set(counts) == {8} if task == "mqar" else len(set(counts)) > 3 and min(counts) >= 1 and max(counts) <= 8
