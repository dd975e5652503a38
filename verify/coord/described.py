"""A description as a subject: the graph itself is run, with every tensor in view."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor

from widthwise.derive import Graph, RuleTable
from widthwise.derive.errors import DeriveError
from widthwise.derive.exponents import ZERO
from widthwise.derive.graph import Dim, Node, atoms
from widthwise.derive.table import Rule
from widthwise.verify.coord.predict import used_in
from widthwise.verify.coord.subject import Batch, Effect, Model, Snapshot, mixed
from widthwise.verify.execute import Setting, apply, draw_one, execute

# Entries of width-free axes, and of growing ones over the base width: small, so that the widest model stays quick.
FREE = {"vocab": 64, "taps": 4, "G": 2, "H": 4, "rank": 8, "d_state": 16, "d_k": 16, "d_v": 16, "d_head": 16}
SHARE = {"d_k": 1 / 4, "d_v": 1 / 4, "d_head": 1 / 2, "H": 1 / 16, "ffn": 2}
# At the base width gates are near their bias, as in practice, and logits so small that their softmax is linear: a Θ(1)
# input of an exponential that vanishes with the width is no power law before it is small. A tied readout's logits are
# 1/n_base of what they are with a fresh one, because each token meets itself in it.
GATE, READOUT = 0.1, 0.25
LEARNING_RATE = {"sgd": 0.3, "adamw": 1e-3, "adam": 1e-3, "adafactor": 1e-2}
TOKENS = 2, 8  # batch and time: few, because a step is coherent with its own tokens alone
TINY = 1e-12  # eps of norms and of Adam: out of the way, because what they do is a finding and no slope


@dataclass(frozen=True)
class Described:
    """Runs ``graph`` under ``table`` at any width. ``sizes`` has entries of axes at the base width."""

    graph: Graph
    table: RuleTable
    base: int
    sizes: Mapping[str, int] = field(default_factory=dict)
    lr: float | None = None
    eps: float = TINY
    norm_eps: float = TINY
    multipliers: Mapping[str, float] = field(default_factory=dict)  # at the base width, over what is usual here
    tokens: tuple[int, int] = TOKENS
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def setting(self, width: int) -> Setting:
        return Setting(width, self.base, self._sizes, self.norm_eps, self.calm | dict(self.multipliers))

    @cached_property
    def calm(self) -> dict[str, float]:
        """Multipliers at the base width that keep exponentials linear."""
        found = {role: GATE for role in ("a_proj", "dt_proj") if role in self.graph.parameters}
        for node in self.graph.nodes:
            if node.op == "linear" and node.attrs.get("carrier"):
                tied = node.attrs.get("base") == "fan_in"
                found[str(node.attrs["carrier"])] = 1 / self.base if tied else READOUT
        return found

    @cached_property
    def dims(self) -> dict[str, Dim]:
        """Every axis by name."""
        dims = {dim.name: dim for node in self.graph.nodes for dim in atoms(node.shape)}
        return dims | {dim.name: dim for each in self.graph.parameters.values() for dim in atoms(each.shape)}

    @cached_property
    def _sizes(self) -> dict[str, int]:
        return {name: self.sizes.get(name) or self._usual(dim) for name, dim in self.dims.items()}

    def slowed(self, rule: Rule, width: int) -> float:
        """What the number of channels leaves of a learning rate at this width."""
        if not rule.channels:
            return 1.0
        dims = [self.dims[name] for name in rule.channels.split("*")]
        now, at_base = (prod(map(self.setting(each).size, dims)) for each in (width, self.base))
        return rule.slowed(now, at_base)

    @property
    def base_lr(self) -> float:
        """The learning rate at the base width."""
        return LEARNING_RATE.get(self.table.optimizer, 1e-3) if self.lr is None else self.lr

    def _usual(self, dim: Dim) -> int:
        if dim.exponent == ZERO:
            return FREE.get(dim.name, 8)
        return max(1, round(self.base * SHARE.get(dim.name, 1)))

    def batch(self, seed: int) -> Batch:
        """Random tokens, and random tokens to predict."""
        generator = torch.Generator().manual_seed(mixed(seed, "tokens"))
        vocabulary = self._sizes.get("vocab", 8)
        tokens, targets = torch.randint(0, vocabulary, (2, *self.tokens), generator=generator)
        data = {"tokens": tokens, "targets": targets}
        for node in self.graph.nodes:
            if node.op == "input":
                shape = [self._sizes[dim.name] for dim in atoms(node.shape)]
                data[node.output] = torch.randn(*self.tokens, *shape, generator=generator).to(self.dtype)
        return {name: value.to(self.device) for name, value in data.items()}

    def make(self, width: int, seed: int) -> Model:
        setting = self.setting(width)
        drawn = {}
        for role, parameter in self.graph.parameters.items():
            generator = torch.Generator(self.device).manual_seed(mixed(seed, role))
            value = draw_one(parameter, self.table, setting, generator).detach()
            drawn[role] = value.to(self.device, self.dtype).requires_grad_(parameter.trainable)
        return Run(self, setting, drawn, optimizer_of(self.table.optimizer, self._groups(drawn, width)))

    def _groups(self, drawn: Mapping[str, Tensor], width: int) -> list[dict[str, Any]]:
        groups = []
        for role, value in drawn.items():
            if not value.requires_grad:
                continue
            rule = self.table.rule(role)
            factors = rule.factors(width, self.base, self.slowed(rule, width))
            group: dict[str, Any] = {"params": [value], "lr": self.base_lr * factors["lr"]}
            if "eps" in factors:
                group["eps"] = self.eps * factors["eps"]
            groups.append(group)
        return groups


OPTIMIZERS: Mapping[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adafactor": torch.optim.Adafactor,
}


def optimizer_of(name: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """torch's optimizer for these groups, without weight decay.

    Raises:
        DeriveError: when torch has none that trains a whole model under this law.
    """
    if name not in OPTIMIZERS:
        raise DeriveError(
            f"torch has no optimizer that does what {name!r} does to a whole model",
            cure="check a factory of your own, which returns (model, optimizer)",
        )
    known = set(OPTIMIZERS[name]([{"params": [torch.zeros(1, requires_grad=True)]}]).param_groups[0])
    plain = [{key: value for key, value in group.items() if key in known} for group in groups]
    return OPTIMIZERS[name]([group | {"weight_decay": 0.0} for group in plain])


@dataclass
class Run:
    subject: Described
    setting: Setting
    drawn: dict[str, Tensor]
    optimizer: torch.optim.Optimizer

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        return self.drawn

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return execute(self.subject.graph, self.subject.table, self.setting, self.drawn, batch).tensors

    def effects(self, before: Snapshot, after: Snapshot, batch: Batch) -> Iterator[Effect]:
        graph = self.subject.graph
        for role, start in before.parameters.items():
            step = after.parameters[role] - start
            bare = False
            for node, slot in graph.consumers(role):
                if node.op not in ("linear", "conv1d", "embedding"):
                    bare = True
                    continue
                sources = [name for name in node.inputs if name != role]
                own = self._apply(node, slot, step, [after.tensors[name] for name in sources], batch)
                changes = [after.tensors[name] - before.tensors[name] for name in sources]
                upstream = self._apply(node, slot, start, changes, batch) if changes else None
                yield Effect(used_in(role, node.output), own, upstream)
            if bare:
                yield Effect(role, step)

    def _apply(self, node: Node, slot: int, weight: Tensor, others: list[Tensor], batch: Batch) -> Tensor:
        """The op of a node, all of which are linear in the weight and linear in the input."""
        arguments = [*others[:slot], weight, *others[slot:]]
        return apply(self.subject.graph, self.subject.table, self.setting, node, arguments, batch)
