"""Forward and backward of one training step: as it comes, or replayed as a CUDA graph.

Small models on a GPU are bound by the launches of their kernels, a thousand a step; a graph launches them all at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from widthwise.verify.transfer.config import Training

Step = Callable[[Tensor, Tensor], Tensor]
"""From tokens and targets [B, T] to the loss, a scalar that the next call may overwrite; gradients are left on the
parameters. It never waits for the device."""

WARM_UPS = 3  # steps outside the graph first: kernels are compiled, workspaces allocated


def loss_of(forward: Any, tokens: Tensor, targets: Tensor, training: Training) -> Tensor:
    """The mean cross-entropy in nats per counted token, of logits that ``forward`` gives."""
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=training.bf16):
        logits = forward(tokens)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def eager(model: nn.Module, forward: Any, training: Training) -> Step:
    """The step as it comes; ``forward`` is the model, or what compiles or wraps it."""

    def step(tokens: Tensor, targets: Tensor) -> Tensor:
        model.zero_grad(set_to_none=True)
        total = torch.zeros((), device=tokens.device)
        parts = zip(tokens.chunk(training.accumulate), targets.chunk(training.accumulate), strict=True)
        for part, answers in parts:
            loss = loss_of(forward, part, answers, training) / training.accumulate
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total

    return step


def captured(model: nn.Module, step: Step, tokens: Tensor, targets: Tensor) -> Step:
    """The same step as a CUDA graph, for tokens and targets of these shapes; parameters are not moved by it.

    Raises:
        RuntimeError: where something in the step cannot be captured.
    """
    buffers = tokens.clone(), targets.clone()
    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(WARM_UPS):
            step(*buffers)
    torch.cuda.current_stream().wait_stream(aside)
    model.zero_grad(set_to_none=True)  # so that gradients are made anew, in the graph's own memory
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(*buffers)

    def replay(tokens: Tensor, targets: Tensor) -> Tensor:
        for buffer, value in zip(buffers, (tokens, targets), strict=True):
            buffer.copy_(value)
        graph.replay()
        return loss

    return replay
