"""One parametrization against another, seed by seed: equal seeds have equal data and draws.

    python bench/transfer/paired.py docs/results/transfer/heads-fixed-sgd-eps.jsonl carrying-channel first-channel

At each width the first one's loss minus the second one's, in nats, mean ± standard error over the seeds of both (their
number): at the transferred rate, which is the best at the base width of each (``--lr`` says another for both), and
tuned anew, at each seed's lowest loss. It is taken over the learning rates that the seed has of both, where these are
three or more, or (``--own``) over each one's own. First for the loss on held-out text, then for that of the last
tenth of the training.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from widthwise.verify.transfer.metrics import curves, standard_error, transfers
from widthwise.verify.transfer.results import Results

Row = Mapping[float, float]
"""Loss by learning rate."""


def read(entries: Iterable[Mapping[str, Any]], kind: str) -> list[dict[str, Any]]:
    """The entries, whose loss is to be of this kind."""
    return [{**entry, "loss": entry[kind]} for entry in entries]


def rates(entries: Iterable[Mapping[str, Any]]) -> list[float]:
    return sorted({each["lr"] for each in entries})


def told(differences: Sequence[float]) -> str:
    if not differences:
        return "·"
    error = standard_error(differences)
    return f"{mean(differences):+.4f}" + (f" ± {error:.4f}" if error == error else "") + f" ({len(differences)})"


def anew(one: Row, other: Row, own: bool) -> Iterator[float]:
    """The difference of the lowest losses, if there are enough learning rates."""
    here, there = (one.keys(), other.keys()) if own else (one.keys() & other.keys(),) * 2
    if min(len(here), len(there)) >= 3:
        yield min(one[lr] for lr in here) - min(other[lr] for lr in there)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("one")
    parser.add_argument("other")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--own", action="store_true")
    options = parser.parse_args()
    entries = list(Results(options.results).load().values())
    known = sorted({each["parametrization"] for each in entries})
    if stray := {options.one, options.other} - set(known):
        parser.error(f"no parametrization {min(stray)} in {options.results}; there are {', '.join(known)}")
    if options.lr and options.lr not in rates(entries):
        parser.error(f"no run at {options.lr}; there are {', '.join(f'{lr:g}' for lr in rates(entries))}")
    base = entries[0]["sizes"]["width"]
    best = {each.parametrization: each.best_lr for each in transfers(entries) if each.width == base}
    for kind, what in (("loss", "held out"), ("train_loss", "in training")):
        found = {(each.parametrization, each.width): each.by_seed for each in curves(read(entries, kind))}
        for width in sorted({width for _, width in found} - {base}):
            mine, theirs = (found.get((name, width), {}) for name in (options.one, options.other))
            pairs = [(mine[seed], theirs[seed]) for seed in sorted(mine.keys() & theirs.keys())]
            if not pairs:
                continue
            at, to = (options.lr or best[name] for name in (options.one, options.other))
            moved = [one[at] - other[to] for one, other in pairs if at in one and to in other]
            lowest = [each for one, other in pairs for each in anew(one, other, options.own)]
            print(f"{width}, {what}: transferred {told(moved)}; tuned anew {told(lowest)}")


if __name__ == "__main__":
    main()
