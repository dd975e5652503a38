"""Which norm's eps is it? Runs of the sweeps with a larger eps of the output norms alone, of all others, and of all.

    python bench/transfer/which_norms.py --jobs 3 --output FILE.json      # CUDA_VISIBLE_DEVICES names the GPUs

At the rate that is best at the base width, two seeds; held-out losses.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import cycle, product
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

EPS = 3e-3
WHICH: dict[str, Callable[[str], bool]] = {
    "none": lambda name: False,
    "o_norm": lambda name: name.endswith("o_norm"),
    "others": lambda name: not name.endswith("o_norm"),
    "all": lambda name: True,
}
SETS = (  # sweep, parametrization, learning rate
    ("head-dim-fixed-adamw", "widthwise", 0.0110485),
    ("head-dim-fixed-sgd", "largest-channel", 0.707107),
    ("heads-fixed-sgd", "largest-channel", 0.707107),
)
WIDTHS, SEEDS = (128, 1024), (0, 1)

Job = tuple[str, str, float, int, int, str]


def one(job: Job, place: str) -> tuple[Job, float | None]:
    os.environ["CUDA_VISIBLE_DEVICES"] = place  # holds for the first job of a process: later ones stay on its device
    from torch import nn

    from widthwise.verify.transfer import train
    from widthwise.verify.transfer.config import read_sweep

    file, name, lr, width, seed, which = job
    build = train.build

    def altered(*args: Any) -> Any:
        made = build(*args)
        for at, module in made[0].named_modules():
            if isinstance(module, nn.RMSNorm) and WHICH[which](at):
                module.eps = EPS
        return made

    train.build = altered
    try:
        run = read_sweep(Path(__file__).parent / f"{file}.toml").run(name, width, lr, seed)
        return job, train.train(run)["loss"]
    finally:
        train.build = build


def jobs() -> Iterator[Job]:
    for width, (file, name, lr), seed, which in product(WIDTHS, SETS, SEEDS, WHICH):
        yield file, name, lr, width, seed, which


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="at a time, on each GPU")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    places = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",") * options.jobs
    found: dict[str, dict[str, float | None]] = {}
    with ProcessPoolExecutor(len(places), get_context("spawn")) as pool:
        for done in as_completed(pool.submit(one, *each) for each in zip(jobs(), cycle(places))):
            (file, _, _, width, seed, which), loss = done.result()
            found.setdefault(f"{file} {width} {which}", {})[str(seed)] = loss
            if options.output:
                options.output.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n")
    print("| | " + " | ".join(WHICH) + " |\n| --- |" + " ---: |" * len(WHICH))
    for (file, _, _), width in product(SETS, WIDTHS):
        cells = (found[f"{file} {width} {which}"].values() for which in WHICH)
        print(
            f"| {file}, {width} | "
            + " | ".join(f"{fmean(each):.4f}" if None not in each else "–" for each in cells)
            + " |"
        )


if __name__ == "__main__":
    main()
