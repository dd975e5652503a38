"""A factory of the user's as a subject: ``make_model(width)``, watched from outside through module hooks."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from widthwise.codegen.request import Request
from widthwise.derive import Graph, RuleTable
from widthwise.derive.architectures import ARCHITECTURES
from widthwise.derive.errors import DeriveError
from widthwise.derive.graph import Parameter, Rows, extent
from widthwise.derive.table import Rule
from widthwise.derive.toml_io import read_toml
from widthwise.verify.coord.described import LEARNING_RATE, TOKENS, optimizer_of
from widthwise.verify.coord.predict import used_in
from widthwise.verify.coord.subject import Batch, Effect, Model, Snapshot, mixed

Loss = Callable[[nn.Module], Tensor]
EXACT = (nn.Linear, nn.Embedding, nn.Conv1d)  # modules whose differences are taken in double precision


def described_by(rules: Path, description: str | None) -> tuple[Graph, RuleTable]:
    """The graph that a file of rules is about, and the rules.

    Raises:
        DeriveError: when the file is not such a file, or the graph is not known.
    """
    try:
        table = read_toml(rules.read_text(encoding="utf-8"), str(rules))
    except (OSError, UnicodeDecodeError) as error:
        raise DeriveError(
            f"cannot read {rules}: {error}", cure="give what widthwise derive --format toml wrote"
        ) from None
    if description is None and table.architecture not in ARCHITECTURES:
        raise DeriveError(
            f"{rules} is about {table.architecture!r}, which is no architecture of ours",
            cure="say where it is described: --description model.toml (traced), or package.module:function",
        )
    options = tuple(f"{name}={value}" for name, value in table.options.items())
    return Request(description or table.architecture, options=options).graph(), table


@contextmanager
def theirs(what: str, cure: str = "mend it") -> Iterator[None]:
    """Somebody else's code, which may raise anything: theirs to read, and no traceback of ours."""
    try:
        yield
    except Exception as error:
        raise DeriveError(f"{what} failed: {type(error).__name__}: {error}", cure=cure) from error


@dataclass(frozen=True)
class Factory:
    """Makes models with ``make(width)``, under a global seed that is the same for all widths.

    ``make`` returns a model, or (model, optimizer), or (model, optimizer, loss) with ``loss(model)`` a scalar on one
    fixed batch. Without an optimizer the rules give one; without a loss the model takes tokens [B, T] and returns
    logits [B, T, vocabulary], or something that has them as ``.logits`` or first.
    """

    name: str
    factory: Callable[[int], Any]
    graph: Graph
    table: RuleTable
    base: int
    lr: float | None = None
    device: str = "cpu"
    _shapes: dict[int, dict[str, tuple[int, ...]]] = field(default_factory=dict)

    @classmethod
    def imported(
        cls, name: str, graph: Graph, table: RuleTable, base: int, lr: float | None = None, device: str = "cpu"
    ) -> Factory:
        """The factory that ``package.module:function`` names.

        Raises:
            DeriveError: when there is no such function.
        """
        module, _, function = name.partition(":")
        sys.path.insert(0, "")
        try:
            with theirs(f"importing {name}", "give package.module:function, importable from here"):
                found = getattr(importlib.import_module(module), function)
        finally:
            sys.path.remove("")
        return cls(name, found, graph, table, base, lr, device)

    def batch(self, seed: int) -> Batch:
        """Random numbers in (0, 1) for tokens and targets, which a model of any vocabulary can use."""
        generator = torch.Generator().manual_seed(mixed(seed, "tokens"))
        tokens, targets = torch.rand(2, *TOKENS, generator=generator)
        return {"tokens": tokens.to(self.device), "targets": targets.to(self.device)}

    def make(self, width: int, seed: int) -> Model:
        torch.manual_seed(mixed(seed, "factory") % 2**63)
        with theirs(f"{self.name}({width})"):
            made = self.factory(width)
        parts = made if isinstance(made, tuple) else (made,)
        model, optimizer, loss = (*parts, None, None)[:3]
        if not isinstance(model, nn.Module):
            raise DeriveError(
                f"{self.name}({width}) gave {type(model).__name__}, not a model",
                cure="return a torch.nn.Module, or (model, optimizer), or (model, optimizer, loss)",
            )
        self._check_shapes(model, width)
        for rule in self.table.rules:
            self.slowed(rule, width)  # whether that can be told is said before anything is trained
        named = self._by_role(model)
        if optimizer is None:
            optimizer = optimizer_of(self.table.optimizer, self._groups(model, width))
        return _Run(self, width, model.to(self.device), optimizer, loss, named)

    def _check_shapes(self, model: nn.Module, width: int) -> None:
        shapes = {plain(name): tuple(each.shape) for name, each in model.named_parameters()}
        for other, before in self._shapes.items():
            if odd := sorted(set(shapes) ^ set(before)):
                here = width if odd[0] in shapes else other
                raise DeriveError(
                    f"{odd[0]} is a parameter at width {here} alone",
                    where=self.name,
                    cure="make equal models but for sizes",
                )
            if other != width and shapes == before:
                raise DeriveError(
                    f"the models of width {other} and {width} have the same shapes",
                    where=self.name,
                    cure="let the factory use its width",
                )
        self._shapes.setdefault(width, shapes)

    def _by_role(self, model: nn.Module) -> dict[str, tuple[str, nn.Parameter]]:
        """The first parameter of each role, with its name; several roles may be rows of one.

        Raises:
            DeriveError: when parameters and rules do not fit.
        """
        found: dict[str, tuple[str, nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            roles = self._roles(name)
            if not roles and parameter.requires_grad:
                raise DeriveError(
                    f"no rule names the parameter {plain(name)}",
                    where=self.name,
                    cure="derive rules for this model, or give its parameters the names that the rules have",
                )
            for role in roles:
                found.setdefault(role, (plain(name), parameter))
        missing = [role for role in self.graph.parameters if role not in found]
        if missing:
            globs = ", ".join(self.table.rule(missing[0]).parameters)
            raise DeriveError(
                f"rule {missing[0]} names no parameter of the model ({globs})", where=self.name, cure="as above"
            )
        return found

    def _roles(self, name: str) -> list[str]:
        return [
            rule.role
            for rule in self.table.rules
            if any(re.fullmatch(re.escape(glob).replace(r"\*", r"[^.]+"), plain(name)) for glob in rule.parameters)
        ]

    def slowed(self, rule: Rule, width: int) -> float:
        """What the number of channels, read off a parameter of a model made at this width, leaves of a learning rate.

        Raises:
            DeriveError: when no parameter has that many entries along an axis.
        """
        if not rule.channels:
            return 1.0
        for parameter in self.graph.parameters.values():
            for axis, group in enumerate(parameter.shape):
                if str(group) == rule.channels:
                    now = self._entries(parameter, axis, width)
                    return rule.slowed(now, now * (self.base / width) ** float(extent(group.dims)))
        raise DeriveError(
            f"the learning rate of {rule.role} depends on the size of {rule.channels}, which no parameter has",
            where=self.name,
            cure="check the rules of --assume at-init",
        )

    def _entries(self, parameter: Parameter, axis: int, width: int) -> int:
        """How many entries a parameter has along an axis of its description, in the model made at this width."""
        if parameter.input_first:
            axis = 0 if axis == len(parameter.shape) - 1 else axis + 1
        rows = parameter.rows
        if rows is not None and rows.axis == axis:
            return _grown(rows, width / rows.width)[rows.index]
        shape = next(shape for name, shape in self._shapes[width].items() if parameter.role in self._roles(name))
        if len(shape) > len(parameter.shape):  # as those of a depthwise convolution, [channels, 1, taps]
            shape = tuple(size for size in shape if size != 1)
        return shape[axis]

    def _groups(self, model: nn.Module, width: int) -> list[dict[str, Any]]:
        base = LEARNING_RATE.get(self.table.optimizer, 1e-3) if self.lr is None else self.lr
        groups = []
        for name, parameter in model.named_parameters():
            rules = [self.table.rule(role) for role in self._roles(name)]
            rates = {rule.factors(width, self.base, self.slowed(rule, width))["lr"] for rule in rules}
            if len(rates) > 1 and parameter.requires_grad:
                raise DeriveError(
                    f"the rows of {plain(name)} need different learning rates",
                    where=self.name,
                    cure="split it, or let the factory return its own optimizer",
                )
            if rates and parameter.requires_grad:
                groups.append({"params": [parameter], "lr": base * rates.pop()})
        return groups


@dataclass
class _Run:
    subject: Factory
    width: int
    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Loss | None
    named: Mapping[str, tuple[str, nn.Parameter]]
    inputs: list[dict[str, tuple[Any, ...]]] = field(default_factory=list)

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        found: dict[str, Tensor] = {}
        for role, (_, parameter) in self.named.items():
            if parameter.requires_grad and self._rows(role) is None:
                found[role] = parameter
            elif parameter.requires_grad:
                found[role] = self._part(role, parameter.detach())
                found[role].grad = None if parameter.grad is None else self._part(role, parameter.grad)
        return found

    def _rows(self, role: str) -> Rows | None:
        return self.subject.graph.parameters[role].rows

    def _part(self, role: str, whole: Tensor, axis: int | None = None) -> Tensor:
        """A role's rows of a packed tensor, along an axis; all of one that is not packed."""
        rows = self._rows(role)
        if rows is None:
            return whole
        axis = rows.axis if axis is None else axis % whole.dim()
        sizes = _grown(rows, self.width / rows.width)
        split = whole.reshape(*whole.shape[:axis], -1, sum(sizes), *whole.shape[axis + 1 :])
        return split.narrow(axis + 1, sum(sizes[: rows.index]), sizes[rows.index]).flatten(axis, axis + 1)

    @property
    def owners(self) -> dict[str, tuple[nn.Module, str, str]]:
        """For each role that belongs to a layer of its own: that module, the parameter's name in it, and the tensor
        it makes. A layer whose multiplier may be applied outside of it makes no tensor of the description."""
        graph, found = self.subject.graph, {}
        modules = {plain(name): module for name, module in self.model.named_modules()}
        for role, (name, _) in self.named.items():
            path, _, attribute = name.rpartition(".")
            makers = [node for node, _ in graph.consumers(role)]
            scaled = self.subject.table.gauge == "multiplier" and makers[0].attrs.get("carrier")
            plainly = len(makers) == 1 and not self.subject.table.rule(role).multiplier and not scaled
            alone = self._rows(role) is None or _splits(modules[path])
            if plainly and alone and attribute == "weight" and not list(modules[path].children()):
                found[role] = (modules[path], attribute, makers[0].output)
        return found

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}
        inputs: dict[str, tuple[Any, ...]] = {}
        with self._watched(seen, inputs):
            if self.loss is not None:
                with theirs(f"the loss of {self.subject.name}({self.width})"):
                    loss = self.loss(self.model)
                if not isinstance(loss, Tensor) or loss.dim():
                    raise DeriveError(
                        f"the loss of {self.subject.name} is {_kind(loss)}", cure="let it return a scalar tensor"
                    )
            else:
                logits, loss = self._language(batch)
                seen[self._logits] = logits
        self.inputs = [*self.inputs[:1], inputs]
        for value in seen.values():
            if value.requires_grad:
                value.retain_grad()
        return seen | {"loss": loss}

    @property
    def _logits(self) -> str:
        """What the description calls the model's output: what its loss reads."""
        return next((node.inputs[0] for node in self.subject.graph.nodes if node.op == "cross_entropy"), "logits")

    def _language(self, batch: Batch) -> tuple[Tensor, Tensor]:
        tables = [each for each in self.model.modules() if isinstance(each, nn.Embedding)]
        if not tables:
            raise DeriveError(
                "a model without an embedding takes no tokens",
                where=self.subject.name,
                cure="let the factory return (model, optimizer, loss), with loss(model) on a batch of yours",
            )
        size = tables[0].num_embeddings
        with theirs(f"the model of {self.subject.name}({self.width}), given tokens,"):
            out = self.model((batch["tokens"] * size).long())
        logits = getattr(out, "logits", out[0] if isinstance(out, tuple) else out)
        if not isinstance(logits, Tensor):
            raise DeriveError(
                f"the model returned {type(out).__name__}, without logits",
                where=self.subject.name,
                cure="let the factory return (model, optimizer, loss), with loss(model) on a batch of yours",
            )
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), (batch["targets"] * size).long().flatten())

    @contextmanager
    def _watched(self, seen: dict[str, Tensor], inputs: dict[str, tuple[Any, ...]]) -> Iterator[None]:
        """Outputs and inputs of the layers that own a role; hooks are removed whatever happens."""
        handles = []
        for role, (module, _, tensor) in self.owners.items():

            def note(_: nn.Module, given: tuple[Any, ...], out: Any, role: str = role, tensor: str = tensor) -> None:
                value = out[0] if isinstance(out, tuple) else out
                if isinstance(value, Tensor) and role not in inputs:
                    seen[tensor] = self._part(role, value, -1)
                    inputs[role] = tuple(each.detach() if isinstance(each, Tensor) else each for each in given)

            handles.append(module.register_forward_hook(note))
        try:
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def effects(self, before: Snapshot, after: Snapshot, batch: Batch) -> Iterator[Effect]:
        first, last = self.inputs
        for role, (module, attribute, tensor) in self.owners.items():
            if role not in before.parameters or role not in last or any(n.op == "einsum" for n in self._readers(role)):
                continue
            weights = before.parameters[role], after.parameters[role]
            old, new = (_called(module, attribute, weight, last[role]) for weight in weights)
            start = _called(module, attribute, weights[0], first[role])
            changed = any(isinstance(each, Tensor) and each.is_floating_point() for each in first[role])
            yield Effect(used_in(role, tensor), new - old, old - start if changed else None)
        for role, value in before.parameters.items():
            if any(node.op not in ("linear", "conv1d", "embedding") for node in self._readers(role)):
                yield Effect(role, after.parameters[role] - value)

    def _readers(self, role: str) -> list[Any]:
        return [node for node, _ in self.subject.graph.consumers(role)]


def _grown(rows: Rows, ratio: float) -> list[int]:
    """The sizes of a packed tensor's parts at so many times the width that they are given for."""
    return [round(size * ratio ** float(power)) for size, power in zip(rows.sizes, rows.exponents, strict=True)]


def _splits(module: nn.Module) -> bool:
    """Whether rows of a layer's weight make parts of its output by themselves."""
    return isinstance(module, nn.Linear) and module.bias is None


def _called(module: nn.Module, attribute: str, weight: Tensor, inputs: tuple[Any, ...]) -> Tensor:
    """The output of a layer at another weight, in double precision where that is safe."""
    if isinstance(module, EXACT):
        state = {name: each.detach().double() for name, each in module.named_parameters()}
        state[attribute] = weight.double()
        inputs = tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)
    else:
        state = {attribute: weight}
    with torch.no_grad():
        out = torch.func.functional_call(module, state, inputs)
    value: Tensor = out[0] if isinstance(out, tuple) else out
    return value


def _kind(value: object) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def plain(name: str) -> str:
    """A name without the parts that torch.compile, DDP and checkpoint wrappers put in."""
    parts = [part for part in name.split(".") if part not in ("_orig_mod", "_checkpoint_wrapped_module")]
    return ".".join(parts[1:] if parts[:1] == ["module"] else parts)
