"""A description as a subject: the model and the parametrization that are generated from it, as they are."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from types import CodeType, FrameType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from widthwise.codegen.render import render
from widthwise.codegen.request import Request
from widthwise.verify.coord.described import Described, Run, optimizer_of
from widthwise.verify.coord.subject import Batch, Effect, Model, Snapshot, mixed
from widthwise.verify.execute import Setting, apply
from widthwise.verify.loading import imported


@dataclass(frozen=True)
class Emitted(Described):
    """Makes the generated model, initializes it by the generated ``init_`` and trains it in the generated groups.

    Tensors are the local variables of the model's forward methods, which bear the names of the description; of several
    layers, the first one's. What happens inside of a kernel (normalized keys, decay) has no variable: its values are
    computed again from what goes in, and it has no gradient.
    """

    request: Request = field(kw_only=True)
    depth: int = 1

    def prepare(self) -> None:
        """Generate and import now, so that what cannot be generated says so."""
        assert self.modules

    @cached_property
    def modules(self) -> tuple[ModuleType, ModuleType]:
        """The model and its parametrization, imported.

        Raises:
            DeriveError: when the description has no model.
        """
        model = imported(render(self.request, "model"), f"{self.graph.name}_model")
        return model, imported(render(self.request), f"{self.graph.name}_parametrization")

    def make(self, width: int, seed: int) -> Model:
        emitted, rules = self.modules
        setting = self.setting(width)
        cls = next(each for each in vars(emitted).values() if hasattr(each, "widened"))
        sizes = {dim.name: setting.size(dim) for dim in self.dims.values()}
        taken = {name: sizes[name] for name in emitted.AXES if name in sizes}
        if "depth" in emitted.AXES:
            taken["depth"] = self.depth
        model = cls(**taken | {"width": width}, norm_eps=self.norm_eps, dtype=self.dtype, device="meta")
        wanted = setting.multipliers
        base = {role: value for role, value in wanted.items() if role in emitted.MULTIPLIERS}
        rules.init_(
            model,
            width=width,
            base_width=self.base,
            seed=mixed(seed, "init"),
            norm_eps=self.norm_eps,
            base_multipliers=base,
            device=self.device,
        )
        for role, value in wanted.items():  # gates near their bias: no rule of theirs has a multiplier
            if role not in base:
                _scale(model, self.graph.parameters[role].patterns, value)
        groups = rules.param_groups(
            model, lr=self.base_lr, eps=self.eps, width=width, base_width=self.base, base_multipliers=base
        )
        return _EmittedRun(
            self, setting, self._by_role(model, setting), optimizer_of(self.table.optimizer, groups), model, emitted
        )

    def _by_role(self, model: nn.Module, setting: Setting) -> dict[str, Tensor]:
        named: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():
            named.setdefault(re.sub(r"\.\d+(?=\.)", ".*", name), parameter)
        return {role: named[each.patterns[0]] for role, each in self.graph.parameters.items()}


@dataclass
class _EmittedRun(Run):
    model: nn.Module
    module: ModuleType

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """With an axis for every axis of the description."""
        graph = self.subject.graph
        shapes = {role: self.setting.shape(graph.parameters[role].shape) for role in self.drawn}
        return {role: _viewed(value, shapes[role]) for role, value in self.drawn.items()}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}
        with locals_of(self.module, seen):
            self.model(batch["tokens"], batch["targets"])
        graph = self.subject.graph
        tensors: dict[str, Tensor] = {}
        for node in graph.ordered:  # in the order of the forward pass, completed on the way
            if node.output in seen and node.output in graph.named:
                value = tensors[node.output] = seen[node.output]
                if value.requires_grad and value.dim():
                    value.retain_grad()
                continue
            with torch.no_grad():
                values = tensors | dict(self.parameters)
                inputs = [self._axes(name, values[name]) for name in node.inputs]
                tensors[node.output] = apply(graph, self.subject.table, self.setting, node, inputs, batch)
        return tensors

    def effects(self, before: Snapshot, after: Snapshot, batch: Batch) -> Iterator[Effect]:
        return super().effects(self._in_axes(before), self._in_axes(after), batch)

    def _in_axes(self, snapshot: Snapshot) -> Snapshot:
        return Snapshot({name: self._axes(name, each) for name, each in snapshot.tensors.items()}, snapshot.parameters)

    def _axes(self, name: str, value: Tensor) -> Tensor:
        """A tensor with an axis for every axis of the description, behind batch and time if it has them."""
        shape = self.setting.shape(self.subject.graph.shapes[name])
        return value.reshape(shape if value.numel() == prod(shape) else (*value.shape[:2], *shape))


def _viewed(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(value.shape) == shape:
        return value
    viewed = value.detach().view(shape)
    viewed.grad = None if value.grad is None else value.grad.view(shape)
    return viewed


def _scale(model: nn.Module, patterns: tuple[str, ...], by: float) -> None:
    """Scale the outputs of the modules that hold a parameter, as a multiplier would."""
    for name, module in model.named_modules():
        if f"{re.sub(r'[.][0-9]+(?=[.]|$)', '.*', name)}.weight" in patterns:
            module.register_forward_hook(lambda module, inputs, output: output * by)


@contextmanager
def locals_of(module: ModuleType, into: dict[str, Tensor]) -> Iterator[None]:
    """Collect the tensors in local variables of the forward methods of a module's classes as they return; of a name
    that occurs more than once, the first. The model runs eagerly meanwhile, compiled or not."""
    codes = set(_forwards(module))

    def listener(frame: FrameType, event: str, _: object) -> None:
        if event == "return" and frame.f_code in codes:
            for name, value in frame.f_locals.items():
                if isinstance(value, Tensor):
                    into.setdefault(name, value)

    before: Callable[..., Any] | None = sys.getprofile()
    with torch.compiler.set_stance("force_eager"):
        sys.setprofile(listener)
        try:
            yield
        finally:
            sys.setprofile(before)


def _forwards(module: ModuleType) -> Iterator[CodeType]:
    """Those of the classes that the description is made of, which share a config; helpers have names of their own."""
    for each in vars(module).values():
        own = isinstance(each, type) and issubclass(each, nn.Module) and each.__module__ == module.__name__
        if own and (hasattr(each, "widened") or "config" in inspect.signature(each.__init__).parameters):
            yield each.forward.__code__
