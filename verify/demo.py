"""A minute on a CPU: one learning rate, two widths, standard parametrization beside the derived one, on real text."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn

from widthwise.codegen.render import render
from widthwise.codegen.request import Request
from widthwise.derive.errors import DeriveError
from widthwise.verify.data import VOCABULARY, Corpus, corpus
from widthwise.verify.loading import imported

BASE, WIDE = 32, 256
LEARNING_RATE = 1e-2  # near the best one at the base width
BATCH, LENGTH = 8, 128


@dataclass(frozen=True)
class Run:
    """One training run: the loss in nats per byte on text that was not trained on."""

    width: int
    parametrization: str
    loss: float


def generate(request: Request, folder: Path) -> tuple[ModuleType, ModuleType]:
    """The parametrization and the model of a request, written to a folder and imported from there."""
    modules = []
    for emit in ("parametrization", "model"):
        file, text = folder / f"{request.architecture}_{emit}.py", render(request, emit)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        except OSError as error:
            raise DeriveError(f"cannot write {file}: {error.strerror}", cure="give another folder") from None
        modules.append(imported(text, file.stem))
    return modules[0], modules[1]


def build(rules: ModuleType, models: ModuleType, width: int, derived: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model of two heads that grow with the width, and its optimizer.

    Standard parametrization is what the rules are at the base width, used at every width: weights of
    N(0, 1/fan_in), one learning rate, no multipliers.
    """
    model = models.GatedDeltaNetLM(
        width=width, depth=2, vocab=VOCABULARY, H=2, d_k=width // 4, d_v=width // 2, ffn=2 * width, taps=4
    )
    base = BASE if derived else width
    rules.init_(model, width=width, base_width=base)
    groups = rules.param_groups(model, lr=LEARNING_RATE, weight_decay=0.1, width=width, base_width=base)
    return model, torch.optim.AdamW(groups, betas=(0.9, 0.95))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: torch.Tensor, targets: torch.Tensor) -> float:
    """One step of training; the loss before it."""
    optimizer.zero_grad()
    loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


@torch.no_grad()
def held_out(model: nn.Module, text: Corpus) -> float:
    """The loss on text that was not trained on."""
    batches = text.batches(BATCH, LENGTH, seed=1, split="valid")
    losses = [
        F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()).item()
        for (tokens, targets), _ in zip(batches, range(8), strict=False)
    ]
    return sum(losses) / len(losses)


def demo(data: Path | None, folder: Path, seconds: float = 60.0, console: Console | None = None) -> list[Run]:
    """Train both parametrizations at both widths for about so many seconds in all, and print the losses.

    Raises:
        DeriveError: when the data cannot be read, or are too few.
    """
    console = console or Console(highlight=False)
    if not 0 < seconds < 86_400:
        raise DeriveError(f"{seconds:g} seconds are no time to train for", cure="give a number of seconds, such as 60")
    text = corpus(data)
    rules, models = generate(Request("gated_deltanet"), folder)
    torch.set_flush_denormal(True)
    cases = [(width, derived) for width in (BASE, WIDE) for derived in (False, True)]
    steps = _affordable(rules, models, text, seconds)
    console.print(
        f"Gated DeltaNet on {text.name} ({len(text.train) / 1e6:.1f} MB): AdamW, learning rate {LEARNING_RATE:g}, "
        f"{steps} steps of {BATCH} × {LENGTH} bytes"
    )
    runs: list[Run] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        try:
            for width, derived in cases:
                name = "derived" if derived else "standard"
                model, optimizer = build(rules, models, width, derived)
                task = progress.add_task(f"width {width:4}, {name:8}", total=steps)
                for (tokens, targets), _ in zip(text.batches(BATCH, LENGTH, seed=0), range(steps), strict=False):
                    step(model, optimizer, tokens, targets)
                    progress.advance(task)
                runs.append(Run(width, name, held_out(model, text)))
        except KeyboardInterrupt:
            progress.console.print("stopped; what was finished:")
    console.print(_table(runs))
    return runs


def _affordable(rules: ModuleType, models: ModuleType, text: Corpus, seconds: float) -> int:
    """How many steps a run may have, judged by the fastest of five at each width: the first warms up, and whatever else
    the machine does at that moment makes others slow."""
    cost = 0.0
    for width in (BASE, WIDE):
        model, optimizer = build(rules, models, width, True)
        times = []
        for (tokens, targets), _ in zip(text.batches(BATCH, LENGTH, seed=0), range(5), strict=False):
            start = time.perf_counter()
            step(model, optimizer, tokens, targets)
            times.append(time.perf_counter() - start)
        cost += min(times)
    return max(10, min(500, int(seconds / (2 * cost))))


def _table(runs: list[Run]) -> Table:
    table = Table(caption="nats per byte, on text that was not trained on", caption_justify="left")
    table.add_column("held-out loss at width")
    widths = sorted({run.width for run in runs})
    for width in widths:
        table.add_column(str(width), justify="right")
    for name in dict.fromkeys(run.parametrization for run in runs):
        losses = {run.width: run.loss for run in runs if run.parametrization == name}
        table.add_row(name, *(f"{losses[width]:.3f}" if width in losses else "·" for width in widths))
    return table
