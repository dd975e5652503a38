"""How each op is written: one function an op, from the values it reads to an expression of PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isfinite

from widthwise.codegen.expressions import (
    ATOM,
    Code,
    called,
    negative,
    product,
    product_of,
    regrouped,
    root,
    total,
)
from widthwise.codegen.fusion import Call
from widthwise.codegen.layout import module_of
from widthwise.codegen.values import Values
from widthwise.derive.errors import DeriveError
from widthwise.derive.exponents import ZERO
from widthwise.derive.graph import Node, Shape

FUNCTIONS: Mapping[str, str] = {
    "silu": "F.silu",
    "gelu": "F.gelu",
    "relu": "F.relu",
    "tanh": "torch.tanh",
    "sigmoid": "torch.sigmoid",
    "softplus": "F.softplus",
    "exp": "torch.exp",
}


def expression(at: Values, node: Node, call: Call) -> Code:
    """The value of a call, times its multiplier where it has one.

    Raises:
        DeriveError: for an op that cannot be written, naming the node.
    """
    if call.kind in FUNCTIONS:
        x = at.value(node.inputs[0])
        return called(FUNCTIONS[call.kind], x.text, wide=x.wide)
    if call.kind not in OPS:
        raise DeriveError(
            f"{call.kind} {node.output!r} cannot be emitted",
            where=node.where,
            cure="generate its parametrization, which needs no model of ours",
        )
    code = OPS[call.kind](at, node, call)
    factor = at.names.multipliers.get(node.output)
    return product(code, Code(f"self.{factor}")) if factor else code


def _embedding(at: Values, node: Node, call: Call) -> Code:
    (table,) = node.inputs
    at.expect(node, len(at.graph.shapes[table]) == 2, "a table of two axes")
    if at.own(node, table):
        return called(at.module(module_of(at.graph.parameters[table])), "tokens")
    return called("F.embedding", "tokens", at.parameter(table))


def _linear(at: Values, node: Node, call: Call) -> Code:
    inner = at.graph.makers[call.absorbed[0]] if call.absorbed else node
    weight = inner.inputs[1]
    at.expect(node, len(at.graph.shapes[weight]) == 2, "a weight of two axes")
    x = at.value(inner.inputs[0], narrow=True).text
    if at.own(inner, weight) and bool(call.absorbed) == (at.bias_of(weight) is not None):
        return called(at.module(module_of(at.graph.parameters[weight])), x)
    bias = [at.parameter(node.inputs[1])] if call.absorbed else []
    return called("F.linear", x, at.parameter(weight), *bias)


def _conv1d(at: Values, node: Node, call: Call) -> Code:
    x, weight = node.inputs
    fits = len(at.graph.shapes[weight]) == 2 and at.own(node, weight)
    at.expect(node, fits, "one axis of channels and taps of its own")
    at.helpers.add("conv")
    return called(at.module(module_of(at.graph.parameters[weight])), at.value(x, narrow=True).text, "cache")


def _norm(at: Values, node: Node, call: Call) -> Code:
    norm, gain = at.graph.makers[node.inputs[0]], node.inputs[1]
    at.helpers.add(norm.op)
    x = at.value(norm.inputs[0], narrow=True).text
    return called(at.module(module_of(at.graph.parameters[gain])), x)


def _rms_norm(at: Values, node: Node, call: Call) -> Code:
    at.eps = True
    size = product_of(node.attrs["axis"], at.size)
    return called(f"F.{node.op}", at.value(node.inputs[0], narrow=True).text, f"({size},)", "eps=self.norm_eps")


def _l2_norm(at: Values, node: Node, call: Call) -> Code:
    at.helpers.add("l2")
    return called("_l2_normalized", at.value(node.inputs[0], narrow=True).text, repr(float(node.attrs["eps"])))


def _add(at: Values, node: Node, call: Call) -> Code:
    return total(*(_regrouped(at, name, node.shape) for name in node.inputs))


def _scale(at: Values, node: Node, call: Call) -> Code:
    at.expect(node, node.attrs["power"] == ZERO, "a factor without a power of the width")
    return _scaled(at, node, at.value(node.inputs[0]))


def _scaled(at: Values, node: Node, x: Code) -> Code:
    factor = float(node.attrs["factor"])
    at.expect(node, isfinite(factor), "a finite factor")
    if factor == -1.0:
        return negative(x)
    return x if factor == 1.0 else product(x, Code(repr(factor)))


def _reshape(at: Values, node: Node, call: Call) -> Code:
    return _regrouped(at, node.inputs[0], node.shape)


def _regrouped(at: Values, name: str, shape: Shape) -> Code:
    return regrouped(at.value(name), at.graph.shapes[name], shape, at.size)


def _einsum(at: Values, node: Node, call: Call) -> Code:
    sides = [at.graph.shapes[name] for name in node.inputs]
    groups = dict.fromkeys(group for side in (*sides, node.shape) for group in side)
    distinct = [dim for group in groups for dim in group.dims]
    regular = len(distinct) == len(set(distinct)) and all(len(side) == len(set(side)) for side in sides)
    at.expect(node, regular or sides == [node.shape] * 2, "axes that are grouped alike, each once")
    bare = [_bare(at, name) for name in node.inputs]
    plain = all([group for group in node.shape if group in side] == list(side) for side in sides)
    a, b = (at.value(name, narrow=not plain) for name in node.inputs)
    if plain:
        a, b = (
            _broadcast(code, side, node.shape, alone) for code, side, alone in zip((a, b), sides, bare, strict=True)
        )
        return product(a, b)
    letter = {group: chr(ord("a") + place) for place, group in enumerate(groups)}
    left, right = (
        ("" if alone else "...") + "".join(letter[group] for group in side)
        for side, alone in zip(sides, bare, strict=True)
    )
    out = ("" if all(bare) else "...") + "".join(letter[group] for group in node.shape)
    return called("torch.einsum", f'"{left},{right}->{out}"', a.text, b.text)


def _bare(at: Values, name: str) -> bool:
    """Whether a tensor comes of parameters alone, and has no axes of batch and time."""
    if name in at.graph.parameters:
        return True
    maker = at.graph.makers[name]
    return maker.op not in ("input", "embedding") and all(_bare(at, source) for source in maker.inputs)


def _scan(at: Values, node: Node, call: Call) -> Code:
    q, k, v, *gates = call.takes
    decay = "None"
    if node.attrs["decay"]:
        decay = at.value(gates.pop(0)).text
        decay = f"{call.log_of_decay}({decay})" if call.log_of_decay else decay
    keys = product_of(at.graph.shapes[node.inputs[1]][-1], at.size) if node.attrs.get("key_scale") else ""
    at.helpers.add("scan")
    return called(
        "_scanned",
        *(at.value(name, narrow=True).text for name in (q, k, v)),
        decay,
        at.value(gates[0]).text,
        f"scale={root(keys) if keys else '1.0'}",
        *["normalize_qk=True"] * call.normalize,
        "cache=cache",
        f'key=(self, "{at.names.variables[node.output]}")',
    )


def _attention(at: Values, node: Node, call: Call) -> Code:
    scale = at.graph.makers[call.absorbed[1]]
    at.expect(scale, scale.attrs["power"] == ZERO, "a factor without a power of the width")
    factor = Code("1.0") if scale.attrs["factor"] == 1.0 else _scaled(at, scale, Code("1.0"))
    if carrier := at.names.multipliers.get(scale.output):
        factor = _scaled(at, scale, Code(f"self.{carrier}"))
    at.helpers.add("attention")
    return called(
        "_attended",
        *(at.value(name, narrow=True).text for name in call.takes),
        f"scale={factor.text}",
        "cache=cache",
        f'key=(self, "{at.names.variables[node.output]}")',
    )


def _broadcast(code: Code, side: Shape, out: Shape, bare: bool) -> Code:
    """A factor with the axes it lacks as axes of size one."""
    index = [":" if group in side else "None" for group in out]
    for needless in ["None", ":"] if bare else [":"]:  # PyTorch lines axes up from the last one
        while index and index[0] == needless:
            index.pop(0)
    if not index:
        return code
    return Code(f"{code.within(ATOM)}[{', '.join(['...', *index])}]", wide=code.wide)


OPS: Mapping[str, Callable[[Values, Node, Call], Code]] = {
    "embedding": _embedding,
    "linear": _linear,
    "conv1d": _conv1d,
    "norm": _norm,
    "rms_norm": _rms_norm,
    "layer_norm": _rms_norm,
    "l2_norm": _l2_norm,
    "add": _add,
    "residual": _add,
    "scale": _scale,
    "reshape": _reshape,
    "einsum": _einsum,
    "scan": _scan,
    "attention": _attention,
}
