"""One run: a generated model, its generated parametrization, an exact loop."""

from __future__ import annotations

import inspect
import itertools
import math
import platform
import time
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from widthwise.codegen.render import render
from widthwise.codegen.request import Request
from widthwise.derive.errors import DeriveError, unknown_name
from widthwise.verify.data import VOCABULARY, Corpus, corpus
from widthwise.verify.loading import imported
from widthwise.verify.transfer import mqar
from widthwise.verify.transfer.config import Run, Training
from widthwise.verify.transfer.step import Step, captured, eager, loss_of
from widthwise.verify.transfer.team import ALONE, Team, description

Batches = Iterator[tuple[Tensor, Tensor]]

OPTIMIZERS: Mapping[str, Any] = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}

CHECK = 50  # steps between looks at the losses, the only times that the loop waits for the device


@cache
def generated(request: Request, emit: str) -> ModuleType:
    """The imported module of a request."""
    return imported(render(request, emit), f"generated_{emit}")


@cache
def _corpus(data: str) -> Corpus:
    return corpus(None if data == "stdlib" else Path(data))


def batches(data: str, training: Training, seed: int, *, split: str = "train") -> Batches:
    """What a run reads: text, or made-up recall."""
    if data in mqar.TASKS:
        return mqar.batches(training.batch, training.length, 2 * seed + (split == "valid"), **mqar.TASKS[data])
    return _corpus(data).batches(training.batch, training.length, seed, split=split)


def skeleton(run: Run) -> nn.Module:
    """The model of a run, without numbers in it.

    Raises:
        DeriveError: where there is no model of this architecture, or of these sizes, nothing to train it by, or a
            learning rate is multiplied of a role that there is not.
    """
    if run.request.optimizer not in OPTIMIZERS:
        raise unknown_name("optimizer that sweeps can train with", run.request.optimizer, list(OPTIMIZERS))
    roles = [rule.role for rule in generated(run.request, "parametrization").SCALING.rules]
    for role in run.lr_multipliers:
        if role not in roles:
            raise unknown_name("role", role, roles)
    models = generated(run.request, "model")
    (cls,) = (value for name, value in vars(models).items() if name.endswith("LM"))  # the one class of the whole model
    try:
        sizes = cls.widened(run.width, **run.sizes)
        also = {} if run.training.norm_eps is None else {"norm_eps": run.training.norm_eps}
        model: nn.Module = cls(**sizes, **also, vocab=VOCABULARY, checkpoint=run.training.checkpoint, device="meta")
    except (TypeError, ValueError) as error:
        takes = [each.name for each in inspect.signature(cls).parameters.values() if each.default is each.empty]
        names = ", ".join(name for name in takes if name not in ("width", "vocab"))
        raise DeriveError(f"[sizes] do not make a {cls.__name__}: {error}", cure=f"it takes {names}") from None
    return model


def build(run: Run, device: torch.device, team: Team = ALONE) -> tuple[nn.Module, list[dict[str, Any]], int]:
    """The model of a run, the groups for its optimizer, its number of parameters."""
    model = skeleton(run)
    rules = generated(run.request, "parametrization")
    team.sharded(model)
    model.to_empty(device=device)  # init_ draws all of it
    widths = {"width": run.width, "base_width": run.base_width}
    rules.init_(model, seed=run.seed, **widths)
    training = run.training
    eps = {"eps": training.eps} if run.request.optimizer != "sgd" else {}
    groups = rules.param_groups(
        model,
        lr=run.lr,
        weight_decay=training.weight_decay,
        lr_multipliers=run.lr_multipliers,
        **eps,
        **widths,
    )
    return model, groups, sum(parameter.numel() for parameter in model.parameters())


def optimizer_of(name: str, groups: list[dict[str, Any]], training: Training, device: torch.device) -> Any:
    """The optimizer of a request; weight decay is decoupled under AdamW, and SGD's momentum is Nesterov's."""
    if name == "sgd":
        return torch.optim.SGD(groups, momentum=training.momentum, nesterov=training.momentum > 0)
    return OPTIMIZERS[name](groups, betas=(training.beta1, training.beta2), fused=device.type == "cuda")


def schedule(training: Training, step: int) -> float:
    """The learning rate of a step, over its peak: linear warm-up, then a cosine down to ``final``."""
    if step < training.warmup:
        return (step + 1) / training.warmup
    progress = (step - training.warmup) / max(1, training.steps - training.warmup)
    return training.final + (1 - training.final) * 0.5 * (1 + math.cos(math.pi * progress))


def train(run: Run, team: Team = ALONE) -> dict[str, Any]:
    """Carry a run out; in a team, all its processes call this, and all have the same outcome.

    Returns:
        ``loss`` on what was not trained on, ``train_loss`` over the last tenth, both in nats per counted token (None
        after divergence); ``diverged``, the step where the loss stopped being a number, or None; ``losses``, fifty
        means along the way; ``tokens``, ``parameters``, ``seconds`` in all and ``step_seconds`` a step; ``graph``,
        whether steps were replayed as a CUDA graph, and ``note``, why not where they should have been.

    Raises:
        DeriveError: when a batch cannot be shared evenly, or data cannot be read.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_flush_denormal(True)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = not run.training.bf16
    training = run.training
    if training.batch % (training.accumulate * team.size):
        raise DeriveError(
            f"a batch of {training.batch} in {training.accumulate} parts has no even shares for {team.size} processes",
            cure="make batch a multiple of both",
        )
    start = time.perf_counter()
    model, groups, parameters = build(run, device, team)
    optimizer = optimizer_of(run.request.optimizer, groups, training, device)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(training, step))
    forward = team.replicated(model)
    forward = torch.compile(forward) if training.compile else forward  # type: ignore[assignment]
    step, how = _step_of(model, forward, run, device, team)
    losses = torch.zeros(training.steps, device=device)
    diverged, begun = None, time.perf_counter()
    data = batches(run.data, training, run.seed)
    for at, (tokens, targets) in enumerate(_ahead(data, training.steps, device, team)):
        losses[at].copy_(step(tokens, targets))
        if training.clip:
            nn.utils.clip_grad_norm_(model.parameters(), training.clip)
        optimizer.step()
        scheduler.step()
        if at % CHECK == CHECK - 1 or at + 1 == training.steps:
            known = team.mean(losses[: at + 1]).isfinite()
            if not bool(known.all()):
                diverged = int((~known).nonzero()[0])
                break
    step_seconds = (time.perf_counter() - begun) / (at + 1)
    held_out = None if diverged is not None else _held_out(forward, run, device, team)
    if held_out is not None and not math.isfinite(held_out):
        diverged, held_out = training.steps, None
    curve = team.mean(losses).cpu()
    return {
        "loss": held_out,
        "train_loss": None if diverged is not None else float(curve[-max(1, training.steps // 10) :].mean()),
        "diverged": diverged,
        "losses": [round(float(each.mean()), 4) for each in curve.chunk(50)] if diverged is None else [],
        "tokens": training.steps * training.batch * training.length,
        "parameters": parameters,
        "seconds": round(time.perf_counter() - start, 2),
        "step_seconds": round(step_seconds, 5),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "python": platform.python_version(),  # whose library is the default text
        **how,
        **description(team),
    }


def _step_of(model: nn.Module, forward: Any, run: Run, device: torch.device, team: Team) -> tuple[Step, dict[str, Any]]:
    """The step, and how it is done. What cannot be captured is done as it comes, and the outcome says so."""
    step = eager(model, forward, run.training)
    if device.type != "cuda" or not run.training.graph or run.training.compile or team.size > 1:
        return step, {"graph": False}
    tokens, targets = next(batches(run.data, run.training, run.seed))
    try:
        return captured(model, step, tokens.to(device), targets.to(device)), {"graph": True}
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        torch.cuda.synchronize()
        reason = (str(error).splitlines() or [""])[0]
        return step, {"graph": False, "note": f"no CUDA graph, which is slower: {reason}"}


def _ahead(data: Batches, steps: int, device: torch.device, team: Team) -> Batches:
    """So many batches, of each this process's rows, brought to the device in blocks: a step waits for no copy."""
    for start in range(0, steps, CHECK):
        block = list(itertools.islice(data, min(CHECK, steps - start)))
        tokens, targets = (torch.stack([team.rows(each) for each in part]) for part in zip(*block, strict=True))
        yield from zip(tokens.to(device), targets.to(device), strict=True)


@torch.no_grad()
def _held_out(model: Any, run: Run, device: torch.device, team: Team) -> float:
    """The loss on the same held-out batches for every run."""
    data = _ahead(batches(run.data, run.training, 0, split="valid"), run.training.validation, device, team)
    losses = [loss_of(model, tokens, targets, run.training) for tokens, targets in data]
    return float(team.mean(torch.stack(losses).mean()))
