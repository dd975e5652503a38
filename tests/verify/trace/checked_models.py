"""Traced models and their generated rules, as the coordinate check takes them."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
import traced_models
from torch import Tensor, nn

from widthwise.codegen.render import render
from widthwise.codegen.request import Request
from widthwise.derive import Graph, RuleTable
from widthwise.derive.graph_toml import write_graph
from widthwise.verify.coord.factory import Factory
from widthwise.verify.trace import trace

BASE, TINY = 64, 1e-12  # eps of Adam: out of the way, because what it does is no slope
CLASSES = ("mlp", "cnn", "resnet", "llama", "qwen3", "gpt2", "mamba2", "qwen3_next")
FIXED = {"depth": 3, "vocab": 96, "taps": 4, "features": 6, "classes": 5, "G": 2, "ffn": 384}
HEADS = {
    None: {"H": 4, "d_k": 32, "d_v": 64, "d_head": 32},
    "heads-fixed": {"H": 4, "d_k": 32, "d_v": 64, "d_head": 32},
    "head-dim-fixed": {"H": 8, "d_k": 16, "d_v": 24, "d_head": 16},
}
# The sum q·k is coherent past a crossover that the engine names (nonlinear-coherence): at d_k ≈ 278 with a convolution,
# and 69 without, which is short in practice. At widths 64 to 256 the heads above are short of the one; these are past
# the other.
LONG = {"H": 2, "d_k": 512, "d_v": 32}
VARIANTS = (
    Request("gated_deltanet"),
    Request("gated_deltanet", scaling="head-dim-fixed"),
    Request("gated_deltanet", scaling="head-dim-fixed", options=("value_groups=on",)),
    Request("gated_deltanet", tied=True),
    Request("gated_deltanet", options=("activation=off",)),
    Request("gated_deltanet", options=("conv=off", "gate=off", "mlp=off")),
    Request("gated_deltanet", options=("decay=off", "qk_scale=d_k^-1/2")),
    Request("gated_deltanet", options=("o_scale=off",)),
    Request("deltanet"),
    Request("transformer"),
    Request("transformer", scaling="head-dim-fixed", options=("gqa=on", "qk_norm=on")),
    Request("mlp"),
)


def imported(text: str, folder: Path, name: str) -> ModuleType:
    """A module of this source, as a file that inspection finds."""
    file = folder / f"{name}.py"
    file.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def emitted(request: Request, folder: Path) -> Callable[[int], traced_models.Made]:
    """What makes the model that is emitted for a request, with example inputs."""
    module = imported(render(request, "model"), folder, "emitted_model")
    (model,) = (each for each in vars(module).values() if isinstance(each, type) and hasattr(each, "widened"))
    heads = LONG if "conv=off" in request.options else HEADS[request.scaling]
    sizes = {"width": 128, "n": 128} | FIXED | heads
    known = inspect.signature(model.__init__).parameters
    sizes = {name: size for name, size in sizes.items() if name in known}
    example = torch.zeros(2, 6) if request.architecture == "mlp" else torch.zeros(2, 6, dtype=torch.long)
    return lambda width: (model(**model.widened(width, **sizes)), (example,))


@dataclass(frozen=True)
class Checked:
    """One of CLASSES by name, or a variant of the emitted models, with rules derived from its trace.

    Rules are in the absorbed gauge, so that the classes need no edit.
    """

    name: str | Request
    optimizer: str = "adamw"
    graph_file: Path | None = None  # a trace made before

    @property
    def title(self) -> str:
        return self.name if isinstance(self.name, str) else f"emitted: {self.name.arguments}"

    @cached_property
    def folder(self) -> Path:
        return Path(tempfile.mkdtemp())

    @cached_property
    def make(self) -> Callable[[int], traced_models.Made]:
        return getattr(traced_models, self.name) if isinstance(self.name, str) else emitted(self.name, self.folder)

    @cached_property
    def request(self) -> Request:
        if (file := self.graph_file) is None:
            file = self.folder / "model.toml"
            file.write_text(write_graph(trace(self.make, traced_models.WIDTHS).graph), encoding="utf-8")
        return Request(str(file), optimizer=self.optimizer, gauge="absorbed")

    @cached_property
    def graph(self) -> Graph:
        return self.request.graph()

    @cached_property
    def table(self) -> RuleTable:
        return self.request.table(self.graph)

    @cached_property
    def rules(self) -> ModuleType:
        return imported(render(self.request), self.folder, "traced_rules")

    def factory(self, device: str = "cpu") -> Factory:
        return Factory(self.title, self._made, self.graph, self.table, BASE, device=device)

    def _made(self, width: int) -> tuple[Any, ...]:
        seed = torch.initial_seed() % 2**31
        model, (example, *_) = self.make(width)
        self.rules.init_(model, width=width, base_width=BASE, seed=seed, norm_eps=1e-6)
        groups = self.rules.param_groups(model, lr=1e-3, eps=TINY, width=width, base_width=BASE)
        optimizer = torch.optim.AdamW([{**group, "weight_decay": 0.0} for group in groups])
        if not example.is_floating_point():
            return model, optimizer
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(16, *example.shape[1:], generator=generator)
        y = torch.randint(0, 5, (16,), generator=generator)

        def loss(model: nn.Module) -> Tensor:
            return F.cross_entropy(model(x), y)

        return model, optimizer, loss
