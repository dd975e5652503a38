"""Predicted against measured: the slope of every tensor's and every gradient's size at initialization."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from widthwise.derive.graph import Graph
from widthwise.derive.table import RuleTable
from widthwise.verify.execute import Setting, draw, execute


@dataclass(frozen=True)
class Slope:
    """Least-squares slope of log size against log width, with its standard error over seeds."""

    name: str
    predicted: float
    measured: float
    error: float

    @property
    def off(self) -> float:
        return abs(self.measured - self.predicted)


@dataclass(frozen=True)
class Sizes:
    """Slopes of forward sizes (rms) and of gradients (geometric mean of the entries), by tensor name.

    The engine speaks of typical sizes. Gradients behind a norm are heavy-tailed, because it divides by the tiny norms
    of a few tokens: their rms tells of those tokens alone.
    """

    forward: tuple[Slope, ...]
    gradient: tuple[Slope, ...]


def measure(
    graph: Graph,
    table: RuleTable,
    settings: list[Setting],
    *,
    seeds: int = 8,
    batch: int = 2,
    length: int = 16,
    vocabulary: int = 16,
) -> Sizes:
    """Run the graph at every setting and seed, and fit the slopes of its named tensors.

    Exponents are slopes over all settings alike. Denormal numbers are flushed, because a decayed state is full of them
    and they make the CPU a hundred times slower.
    """
    torch.set_flush_denormal(True)
    forward: dict[str, list[list[float]]] = {}
    gradient: dict[str, list[list[float]]] = {}
    for seed in range(seeds):
        for setting in settings:
            generator = torch.Generator().manual_seed(_mixed(seed, setting.width))
            parameters = draw(graph, table, setting, generator)
            tokens, targets = torch.randint(0, vocabulary, (2, batch, length), generator=generator)
            run = execute(graph, table, setting, parameters, {"tokens": tokens, "targets": targets})
            run.tensors["loss"].backward()  # type: ignore[no-untyped-call]
            for tensor in table.tensors:
                if tensor.name == "loss" or tensor.name not in run.tensors:
                    continue  # a scan's state is not kept
                value = run.tensors[tensor.name]
                _note(forward, tensor.name, seed, value.detach().square().mean().sqrt())
                if value.grad is not None:
                    entries = value.grad.abs()
                    _note(gradient, tensor.name, seed, entries[entries > 0].log().mean().exp())
    widths = [setting.width for setting in settings]
    sizes = {tensor.name: tensor for tensor in table.tensors}
    return Sizes(
        tuple(_fit(forward, widths, {name: each.forward for name, each in sizes.items()})),
        tuple(_fit(gradient, widths, {name: each.gradient for name, each in sizes.items()})),
    )


def _mixed(seed: int, width: int) -> int:
    """A seed of full entropy: generators seeded with small related numbers start out related (seen here: eight seeds
    whose first draws all leaned the same way)."""
    return int.from_bytes(hashlib.sha256(f"{seed} {width}".encode()).digest()[:7])


def _note(into: dict[str, list[list[float]]], name: str, seed: int, value: Tensor) -> None:
    rows = into.setdefault(name, [])
    if len(rows) <= seed:
        rows.append([])
    rows[seed].append(float(value))


def _fit(rows: Mapping[str, list[list[float]]], widths: list[int], predicted: Mapping[str, object]) -> Iterator[Slope]:
    x = torch.log(torch.tensor(widths, dtype=torch.float64))
    x = x - x.mean()
    for name, sizes in rows.items():
        y = torch.log(torch.tensor(sizes, dtype=torch.float64))
        slopes = (x * (y - y.mean(1, keepdim=True))).sum(1) / x.square().sum()
        error = slopes.std() / len(sizes) ** 0.5 if len(sizes) > 1 else torch.tensor(float("nan"))
        yield Slope(name, float(predicted[name]), float(slopes.mean()), float(error))  # type: ignore[arg-type]
