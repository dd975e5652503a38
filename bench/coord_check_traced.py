"""The coordinate check of models that were traced: classes as users have them, and every emitted variant traced back.

python bench/coord_check_traced.py --jobs 2                                        # on two idle CPU cores
python bench/coord_check_traced.py --name traced_wide --widths 256 512 1024 --classes --jobs 16

The data file is written anew after each model, so that an interruption loses one.
"""

import argparse
import itertools
import json
import platform
import sys
import tempfile
from multiprocessing import get_context
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "verify" / "trace"))
sys.modules["fla"] = None  # transformers would take FLA's kernels where they are installed

from checked_models import CLASSES, VARIANTS, Checked  # noqa: E402

from widthwise.codegen.request import Request  # noqa: E402
from widthwise.derive.graph_toml import write_graph  # noqa: E402
from widthwise.verify.coord.check import Report  # noqa: E402
from widthwise.verify.coord.files import rounded  # noqa: E402
from widthwise.verify.coord.predict import predictions  # noqa: E402
from widthwise.verify.coord.run import Measurements, measure  # noqa: E402
from widthwise.verify.coord.show import table_row  # noqa: E402
from widthwise.verify.coord.stats import results  # noqa: E402

STEPS = 2
Job = tuple[str | Request, Path, tuple[int, ...], int]


def traced(given: tuple[str | Request, Path]) -> Path:
    """Trace a model once, for all seeds."""
    torch.set_num_threads(1)
    name, file = given
    file.write_text(write_graph(Checked(name).graph), encoding="utf-8")
    return file


def one_seed(given: Job) -> Measurements:
    torch.set_num_threads(1)
    name, file, widths, seed = given
    checked = Checked(name, graph_file=file)
    wanted = {each.name for each in predictions(checked.graph, checked.table)} | {"loss"}
    return measure(checked.factory(), widths, [seed], steps=STEPS, wanted=wanted)


def report(name: str | Request, file: Path, widths: tuple[int, ...], seeds: list[Measurements]) -> Report:
    checked = Checked(name, graph_file=file)
    found = Measurements(widths)
    for each in seeds:
        found.join(each)
    held = results(found, predictions(checked.graph, checked.table), STEPS, follows_gradient=False)
    return Report(checked.title, checked.table.hash, widths, len(seeds), STEPS, held, {})


def text(head: str, reports: list[Report]) -> str:
    lines = ["# Coordinate check of traced models", "", head, ""]
    lines += ["What is not ok, and why: [tracing.md](tracing.md).", ""]
    lines += ["| | predictions | ok | drift | unresolved | fail |", "|---|---:|---:|---:|---:|---:|"]
    for each in reports:
        ok, drift, unresolved, fail = (each.counts[verdict] for verdict in ("ok", "drift", "unresolved", "fail"))
        lines.append(f"| {each.title} | {len(each.results)} | {ok} | {drift} | {unresolved} | {fail} |")
    for each in reports:
        lines += ["", f"## {each.title}", "", "| | what | of | step | derived | measured | at the two largest widths |"]
        lines += ["|---|---|---|---|---:|---:|---:|"]
        lines += [table_row(result) for result in each.results if result.verdict != "ok"]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--classes", nargs="*", help="these alone (all of them, where none is named), not the variants")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--name", default="traced", help="of the files")
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    asked = parser.parse_args()
    chosen: list[str | Request] = [*CLASSES, *VARIANTS] if asked.classes is None else [*(asked.classes or CLASSES)]
    widths = tuple(asked.widths)
    told = [word for before, word in itertools.pairwise(["", *sys.argv[1:]]) if "--output" not in (before, word)]
    command = " ".join(["python bench/coord_check_traced.py", *told])
    head = (
        f"`{command}`: widths {asked.widths}, {asked.seeds} seeds, {STEPS} steps of AdamW on one batch of 2 × 8 random "
        f"tokens (16 inputs, for mlp and cnn), float32, CPU; torch {torch.__version__}, {_transformers()}Python "
        f"{platform.python_version()}. Slope of log size against log width ± standard error over seeds."
    )
    asked.output.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp())
    reports: list[Report] = []
    with get_context("spawn").Pool(asked.jobs) as pool:
        files = pool.map(traced, [(name, folder / f"model_{place}.toml") for place, name in enumerate(chosen)], 1)
        jobs = [(name, file, widths, seed) for name, file in zip(chosen, files, strict=True) for seed in _seeds(asked)]
        done = pool.imap(one_seed, jobs)
        for name, file in zip(chosen, files, strict=True):
            reports.append(report(name, file, widths, list(itertools.islice(done, asked.seeds))))
            print(f"{len(reports)} of {len(chosen)}: {reports[-1].title} {reports[-1].counts}", flush=True)
            plain = [each.as_dict() | {"curves": None, "meaning": None} for each in reports]
            data = asked.output / f"coord_check_{asked.name}.json"
            data.write_text(json.dumps(rounded({"head": head, "reports": plain}, 4)) + "\n", encoding="utf-8")
            data.with_suffix(".md").write_text(text(head, reports), encoding="utf-8")


def _seeds(asked: argparse.Namespace) -> range:
    return range(asked.seeds)


def _transformers() -> str:
    try:
        import transformers
    except ImportError:
        return ""
    return f"transformers {transformers.__version__}, "


if __name__ == "__main__":
    main()
