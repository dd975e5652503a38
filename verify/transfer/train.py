"""One run: a generated model, its generated parametrization, an exact loop."""

from __future__ import annotations

import itertools
import math
import platform
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from widthwise.codegen.render import render
from widthwise.codegen.request import Request
from widthwise.verify.data import VOCABULARY, Corpus, corpus
from widthwise.verify.loading import imported
from widthwise.verify.transfer import mqar
from widthwise.verify.transfer.config import Run, Training

Batches = Iterator[tuple[Tensor, Tensor]]


@cache
def generated(request: Request, emit: str) -> ModuleType:
    """The imported module of a request."""
    return imported(render(request, emit), f"generated_{emit}")


@cache
def _corpus(data: str) -> Corpus:
    return corpus(None if data == "stdlib" else Path(data))


def batches(data: str, training: Training, seed: int, *, split: str = "train") -> Batches:
    """What a run reads: text, or made-up recall."""
    if data == "mqar":
        return mqar.batches(training.batch, training.length, 2 * seed + (split == "valid"), vocabulary=VOCABULARY)
    return _corpus(data).batches(training.batch, training.length, seed, split=split)


def build(run: Run, device: torch.device) -> tuple[nn.Module, list[dict[str, Any]], int]:
    """The model of a run, the groups for its optimizer, its number of parameters."""
    rules, models = generated(run.request, "parametrization"), generated(run.request, "model")
    (cls,) = (value for name, value in vars(models).items() if name.endswith("LM"))  # the one class of the whole model
    sizes = cls.widened(run.width, **run.sizes)
    model: nn.Module = cls(**sizes, vocab=VOCABULARY, checkpoint=run.training.checkpoint, device=device)
    widths = {"width": run.width, "base_width": run.base_width}
    rules.init_(model, seed=run.seed, **widths)
    training = run.training
    eps = {"eps": training.eps} if run.request.optimizer != "sgd" else {}
    groups = rules.param_groups(model, lr=run.lr, weight_decay=training.weight_decay, **eps, **widths)
    return model, groups, sum(parameter.numel() for parameter in model.parameters())


def optimizer_of(name: str, groups: list[dict[str, Any]], training: Training, device: torch.device) -> Any:
    """The optimizer of a request; weight decay is decoupled under AdamW, and SGD's momentum is Nesterov's."""
    if name == "sgd":
        return torch.optim.SGD(groups, momentum=training.momentum, nesterov=training.momentum > 0)
    known = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}
    return known[name](groups, betas=(training.beta1, training.beta2), fused=device.type == "cuda")


def schedule(training: Training, step: int) -> float:
    """The learning rate of a step, over its peak: linear warm-up, then a cosine down to ``final``."""
    if step < training.warmup:
        return (step + 1) / training.warmup
    progress = (step - training.warmup) / max(1, training.steps - training.warmup)
    return training.final + (1 - training.final) * 0.5 * (1 + math.cos(math.pi * progress))


def train(run: Run) -> dict[str, Any]:
    """Carry a run out.

    Returns:
        ``loss`` on what was not trained on, ``train_loss`` over the last tenth, both in nats per counted token (None
        after divergence); ``diverged``, the step where the loss stopped being a number, or None; ``losses``, fifty
        means along the way; ``tokens``, ``parameters``, ``seconds``.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_flush_denormal(True)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = not run.training.bf16
    training = run.training
    start = time.perf_counter()
    model, groups, parameters = build(run, device)
    optimizer = optimizer_of(run.request.optimizer, groups, training, device)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(training, step))
    forward = torch.compile(model) if training.compile else model
    losses = torch.zeros(training.steps, device=device)
    diverged = None
    data = batches(run.data, training, run.seed)
    for step in range(training.steps):
        optimizer.zero_grad(set_to_none=True)
        tokens, targets = next(data)
        for part, answer in zip(tokens.chunk(training.accumulate), targets.chunk(training.accumulate), strict=True):
            loss = _loss(forward, part.to(device), answer.to(device), training)
            (loss / training.accumulate).backward()  # type: ignore[no-untyped-call]
            losses[step] += loss.detach() / training.accumulate
        if training.clip:
            nn.utils.clip_grad_norm_(model.parameters(), training.clip)
        optimizer.step()
        scheduler.step()
        if (step % 50 == 49 or step + 1 == training.steps) and not bool(losses[: step + 1].isfinite().all()):
            diverged = int((~losses[: step + 1].isfinite()).nonzero()[0])
            break
    held_out = None if diverged is not None else _held_out(forward, run, device)
    if held_out is not None and not math.isfinite(held_out):
        diverged, held_out = training.steps, None
    tail = losses[-max(1, training.steps // 10) :]
    return {
        "loss": held_out,
        "train_loss": None if diverged is not None else float(tail.mean()),
        "diverged": diverged,
        "losses": [round(float(each.mean()), 4) for each in losses.chunk(50)] if diverged is None else [],
        "tokens": training.steps * training.batch * training.length,
        "parameters": parameters,
        "seconds": round(time.perf_counter() - start, 2),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "python": platform.python_version(),  # whose library is the default text
    }


def _loss(model: Any, tokens: Tensor, targets: Tensor, training: Training) -> Tensor:
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=training.bf16):
        logits = model(tokens)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


@torch.no_grad()
def _held_out(model: Any, run: Run, device: torch.device) -> float:
    """The loss on the same held-out batches for every run."""
    data = batches(run.data, run.training, 0, split="valid")
    losses = [
        _loss(model, tokens.to(device), targets.to(device), run.training)
        for tokens, targets in itertools.islice(data, run.training.validation)
    ]
    return float(torch.stack(losses).mean())
