"""Do gradients reach the sizes that rules count on? Traced Mamba-2 in training, whose B, C start at n^-1/2.

python bench/trained_gradients.py --jobs 2            # ten minutes on two idle CPU cores

Rules take gradients with the sizes that training raises their factors to (docs/theory.md). Here each role's gradient is
measured as training goes on, and its slope over the width held against both derived exponents, at initialization and
trained. Text: a Markov chain over 96 tokens, fresh at each step.
"""

import argparse
import itertools
import platform
import sys
from math import exp, log
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "verify" / "trace"))
from checked_models import Checked

from widthwise.derive.graph_toml import write_graph
from widthwise.verify.coord.predict import predictions
from widthwise.verify.coord.run import _typical
from widthwise.verify.coord.stats import fit

STEPS = (0, 1, 3, 10, 30, 100, 300)
VOCAB, BATCH, LENGTH = 96, 8, 32
Sizes = dict[tuple[str, int], float]


def text(generator: torch.Generator) -> Tensor:
    """Tokens [BATCH, LENGTH + 1], each drawn from one of four successors of the last."""
    successors = torch.randint(VOCAB, (VOCAB, 4), generator=torch.Generator().manual_seed(0))
    tokens = [torch.randint(VOCAB, (BATCH,), generator=generator)]
    for _ in range(LENGTH):
        choice = torch.randint(4, (BATCH,), generator=generator)
        tokens.append(successors[tokens[-1], choice])
    return torch.stack(tokens, 1)


def one(given: tuple[Path, int, int, float]) -> Sizes:
    """Typical sizes by (role, step); the loss under ``loss``."""
    file, width, seed, lr = given
    torch.set_num_threads(1)
    run = Checked("mamba2", graph_file=file).factory().make(width, seed)
    for group in run.optimizer.param_groups:
        group["lr"] *= lr / 1e-3  # what checked models have at the base width
    for module in run.model.modules():
        if hasattr(module, "chunk_size"):
            module.chunk_size = LENGTH  # transformers pads a sequence to whole chunks
    generator = torch.Generator().manual_seed(1000 + seed)
    found: Sizes = {}
    for step in range(STEPS[-1] + 1):
        tokens = text(generator)
        logits = run.model(tokens[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        run.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if step in STEPS:
            found["loss", step] = loss.item()
            for role, value in run.parameters.items():
                squares = value.grad.square()
                found[role, step] = _typical(squares if value.shape[-1] < 16 else squares.mean(-1))
        run.optimizer.step()
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--lr", type=float, default=4e-3, help="at width 64")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    asked = parser.parse_args()
    asked.output.mkdir(parents=True, exist_ok=True)
    checked = Checked("mamba2")
    file = checked.folder / "traced.toml"
    file.write_text(write_graph(checked.graph), encoding="utf-8")
    start = {each.name: each.exponent for each in predictions(checked.graph, checked.table) if "weight g" in each.kind}
    trained = {rule.role: float(rule.eps) for rule in checked.table.rules if rule.eps is not None}
    jobs = [(file, width, seed, asked.lr) for seed in range(asked.seeds) for width in asked.widths]
    with get_context("spawn").Pool(asked.jobs) as pool:
        done = pool.map(one, jobs, 1)
    by_seed = [done[at : at + len(asked.widths)] for at in range(0, len(done), len(asked.widths))]
    told = [word for before, word in itertools.pairwise(["", *sys.argv[1:]]) if "--output" not in (before, word)]
    command = " ".join(["python bench/trained_gradients.py", *told])
    lines = [
        "# Gradients in training",
        "",
        f"`{command}`: Mamba-2 traced, widths {asked.widths}, {asked.seeds} seeds, AdamW at lr "
        f"{asked.lr} (width 64), float32, CPU; torch {torch.__version__}, Python {platform.python_version()}. Slope of "
        "the typical gradient over the width ± standard error over seeds, by step.",
        "",
        "| | derived, at first | derived, trained | " + " | ".join(f"{step}" for step in STEPS) + " |",
        "|---|---:|---:|" + "---:|" * len(STEPS),
    ]
    losses = [
        " / ".join(f"{fmean(seed[at]['loss', step] for seed in by_seed):.2f}" for at in (0, -1)) for step in STEPS
    ]
    lines.append(f"| loss, width {asked.widths[0]} / {asked.widths[-1]} | | | " + " | ".join(losses) + " |")
    for role in trained:
        cells = []
        for step in STEPS:
            slope = fit(asked.widths, [[each[role, step] for each in seed] for seed in by_seed])
            cells.append(f"{slope.value:+.2f} ± {slope.error:.2f}")
        lines.append(f"| `{role}` | {start[role]:g} | {trained[role]:g} | " + " | ".join(cells) + " |")
    (asked.output / "trained_gradients.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    sizes = {
        f"{role} {step}": [exp(fmean(log(seed[at][role, step]) for seed in by_seed)) for at in range(len(asked.widths))]
        for role, step in done[0]
    }
    for name, row in sizes.items():
        print(name, *(f"{size:.2e}" for size in row))


if __name__ == "__main__":
    main()
