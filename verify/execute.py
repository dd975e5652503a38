"""Run a description as it stands: the graph that was derived, with real tensors at a real width.

Small and slow on purpose (a recurrence is a Python loop): it is what predictions of sizes are held against, and
what generated models can be compared with. Batch and time are leading axes ``[B, T, …]``; attention over an implicit
time axis is the one composite that cannot be run this way, and is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from widthwise.derive.errors import DeriveError
from widthwise.derive.graph import Dim, Graph, Node, Parameter, Shape, atoms, base_axis
from widthwise.derive.laws import ONES
from widthwise.derive.table import RuleTable

POINTWISE: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "exp": torch.exp,
}


@dataclass
class Execution:
    """One forward pass: every tensor by name (with gradients after ``loss.backward()``)."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    parameters: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """A width, and how many entries each axis has at the base width.

    ``sizes`` names every axis; an axis of exponent p has ``sizes[name] · (width / base)^p`` entries.
    """

    width: int
    base: int
    sizes: Mapping[str, int]
    eps: float = 0.0
    multipliers: Mapping[str, float] = field(default_factory=dict)  # at the base width, where not the usual value

    def size(self, dim: Dim) -> int:
        if dim.name not in self.sizes:
            raise DeriveError(f"axis {dim.name!r} has no size", cure="give its number of entries at the base width")
        exact: float = self.sizes[dim.name] * (self.width / self.base) ** float(dim.exponent)
        if abs(exact - round(exact)) > 1e-6:
            raise DeriveError(f"axis {dim.name!r} would have {exact:g} entries", cure="choose widths that divide")
        return round(exact)

    def shape(self, shape: Shape) -> tuple[int, ...]:
        return tuple(self.size(dim) for dim in atoms(shape))


def draw(graph: Graph, table: RuleTable, setting: Setting, generator: torch.Generator) -> dict[str, Tensor]:
    """All parameters at this width: each drawn by its base law, then scaled by its rule's init std."""
    drawn: dict[str, Tensor] = {}
    for role, parameter in graph.parameters.items():
        drawn[role] = draw_one(parameter, table, setting, generator)
    return drawn


def draw_one(parameter: Parameter, table: RuleTable, setting: Setting, generator: torch.Generator) -> Tensor:
    """One parameter at this width, by its base law and its rule's init std, on the generator's device."""
    knob = table.rule(parameter.role).init_std
    assert knob is not None
    value: Tensor = _draw_base(parameter, setting, generator) * (setting.width / setting.base) ** float(knob)
    return value.requires_grad_(parameter.trainable)


def _draw_base(parameter: Parameter, setting: Setting, generator: torch.Generator) -> Tensor:
    shape, law = setting.shape(parameter.shape), parameter.law
    if law.name in ("ones", "zeros"):
        return torch.full(shape, float(law == ONES), device=generator.device)
    if law.symmetric and law.name != "taps":
        std = 1.0 if law.name == "unit_normal" else _base_fan_in(setting, parameter.shape) ** -0.5
        return torch.randn(shape, generator=generator, device=generator.device) * std
    uniform = torch.rand(shape, generator=generator, device=generator.device)
    if law.name == "taps":
        return (2 * uniform - 1).mul(float(shape[-1]) ** -0.5)
    if law.name == "log_uniform":
        return torch.log(law.low + (law.high - law.low) * uniform)
    if law.name == "inverse_softplus":
        return torch.log(torch.expm1(law.low * (law.high / law.low) ** uniform))
    raise DeriveError(f"no way to draw {law.name!r}", where=parameter.where, cure="add the law to verify/execute.py")


def _base_fan_in(setting: Setting, shape: Shape) -> int:
    base = replace(setting, width=setting.base)
    product = 1
    for dim in atoms(shape[-1:]):
        product *= base.size(dim)
    return product


def execute(
    graph: Graph, table: RuleTable, setting: Setting, parameters: Mapping[str, Tensor], inputs: Mapping[str, Tensor]
) -> Execution:
    """The forward pass. ``inputs``: ``tokens`` and ``targets`` ``[B, T]`` for models with an embedding, or the
    graph's own inputs ``[B, T, …]`` by name, and ``targets``.

    Raises:
        DeriveError: for an op that cannot be run.
    """
    run = Execution(parameters=dict(parameters))
    for node in graph.ordered:
        arguments = [run.tensors[name] if name in run.tensors else parameters[name] for name in node.inputs]
        out = apply(graph, table, setting, node, arguments, inputs)
        if out.requires_grad and node.op != "cross_entropy":
            out.retain_grad()
        run.tensors[node.output] = out
    return run


def multiplier(graph: Graph, table: RuleTable, setting: Setting, node: Node) -> float:
    """The factor that a node multiplies its output by, at this width."""
    weights = [name for name in node.inputs if name in graph.parameters]
    carrier = node.attrs.get("carrier") or (weights[0] if weights else "")
    rule = next((each for each in table.rules if each.role == carrier), None)
    knob = None if rule is None else rule.multiplier
    axis = base_axis(graph, node)
    usual = 1.0 if axis is None else _base_fan_in(setting, (axis,)) ** -0.5
    scaled: float = 1.0 if knob is None else (setting.width / setting.base) ** float(knob)
    return setting.multipliers.get(carrier, usual) * scaled


def apply(
    graph: Graph,
    table: RuleTable,
    setting: Setting,
    node: Node,
    arguments: list[Tensor],
    inputs: Mapping[str, Tensor],
) -> Tensor:
    """The output of one node, from the values of its inputs.

    Raises:
        DeriveError: for an op that cannot be run.
    """
    by = multiplier(graph, table, setting, node)
    shapes = [graph.shapes[name] for name in node.inputs]
    if node.op == "input":
        return inputs[node.output]
    if node.op == "embedding":
        return arguments[0][inputs["tokens"]] * by
    if node.op == "linear":
        return _linear(arguments[0], arguments[1], shapes) * by
    if node.op == "conv1d":
        return _conv(arguments[0], arguments[1]) * by
    if node.op in ("add", "residual"):
        return sum(arguments[1:], arguments[0])
    if node.op == "scale":
        power: float = (setting.width / setting.base) ** float(node.attrs["power"])
        scaled: Tensor = arguments[0] * (node.attrs["factor"] * power * by)
        return scaled
    if node.op == "reshape":
        return arguments[0]
    if node.op in POINTWISE:
        return POINTWISE[node.op](arguments[0])
    if node.op in ("rms_norm", "layer_norm", "l2_norm", "batch_norm"):
        return _norm(node, arguments[0], setting.eps)
    if node.op == "einsum":
        return _einsum(graph, node, arguments)
    if node.op == "scan":
        return _scan(graph, node, arguments).mul((setting.width / setting.base) ** float(node.attrs["power"]))
    if node.op == "cross_entropy":
        return F.cross_entropy(arguments[0].flatten(0, 1), inputs["targets"].flatten())
    raise DeriveError(f"op {node.op!r} cannot be run", where=node.where, cure="run a graph without it")


def _linear(x: Tensor, weight: Tensor, shapes: list[Shape]) -> Tensor:
    contracted = len(atoms(shapes[1][-1:]))
    last = [list(range(each.dim() - contracted, each.dim())) for each in (x, weight)]
    y: Tensor = torch.tensordot(x, weight, dims=(last[0], last[1]))
    return y


def _conv(x: Tensor, weight: Tensor) -> Tensor:
    taps = weight.shape[-1]
    out = torch.zeros_like(x)
    for lag in range(taps):
        shifted = F.pad(x.transpose(1, -1), (lag, 0))[..., : x.shape[1]].transpose(1, -1)
        out = out + shifted * weight[..., taps - 1 - lag]
    return out


def _norm(node: Node, x: Tensor, eps: float) -> Tensor:
    axes = (0, 1) if node.op == "batch_norm" else tuple(range(-len(node.attrs["axis"].dims), 0))
    if node.op == "l2_norm":
        return x * torch.rsqrt(x.square().sum(axes, keepdim=True) + eps)
    if node.op in ("layer_norm", "batch_norm"):
        x = x - x.mean(axes, keepdim=True)
    return x * torch.rsqrt(x.square().mean(axes, keepdim=True) + eps)


def _letters(graph: Graph, names: tuple[str, ...], out: Shape) -> tuple[list[str], str]:
    dims = dict.fromkeys(dim for name in names for dim in atoms(graph.shapes[name]))
    letter = {dim: chr(ord("a") + index) for index, dim in enumerate(dims)}
    return ["".join(letter[dim] for dim in atoms(graph.shapes[name])) for name in names], "".join(
        letter[dim] for dim in atoms(out)
    )


def _einsum(graph: Graph, node: Node, arguments: list[Tensor]) -> Tensor:
    sides, out = _letters(graph, node.inputs, node.shape)
    lead = [
        "" if name in graph.parameters or argument.dim() == len(side) else "yz"
        for name, argument, side in zip(node.inputs, arguments, sides, strict=True)
    ]
    result = "yz" if any(lead) else ""
    return torch.einsum(f"{lead[0]}{sides[0]},{lead[1]}{sides[1]}->{result}{out}", *arguments)


def _scan(graph: Graph, node: Node, arguments: list[Tensor]) -> Tensor:
    """The recurrence, token by token, for any axes its inputs may lack."""
    q, k, v, *gates = arguments
    value_dims, key = atoms(node.shape), atoms(graph.shapes[node.inputs[0]])[-1]
    letter = {dim: chr(ord("a") + index) for index, dim in enumerate(dict.fromkeys((*value_dims, key)))}
    state_axes = "".join(letter[dim] for dim in (*value_dims, key))
    axes = ["".join(letter[dim] for dim in atoms(graph.shapes[name])) for name in node.inputs]
    decay = (gates.pop(0), axes[3]) if node.attrs["decay"] else None
    strength = (gates.pop(0), axes[-1]) if node.attrs["strength"] else None
    state = torch.zeros(v.shape[0], *v.shape[2:], k.shape[-1], dtype=v.dtype, device=v.device)
    outputs = []
    for t in range(v.shape[1]):
        written = v[:, t]
        if strength is not None and strength[1]:
            written = torch.einsum(f"y{axes[2]},y{strength[1]}->y{axes[2]}", written, strength[0][:, t])
        if decay is not None:
            state = torch.einsum(f"y{state_axes},y{decay[1]}->y{state_axes}", state, decay[0][:, t])
        if strength is not None and node.attrs["erase"]:
            held = torch.einsum(f"y{state_axes},y{axes[1]}->y{axes[2]}", state, k[:, t])
            written = written - torch.einsum(f"y{axes[2]},y{strength[1]}->y{axes[2]}", held, strength[0][:, t])
        state = state + torch.einsum(f"y{axes[2]},y{axes[1]}->y{state_axes}", written, k[:, t])
        outputs.append(torch.einsum(f"y{state_axes},y{axes[0]}->y{axes[2]}", state, q[:, t]))
    return torch.stack(outputs, 1)
