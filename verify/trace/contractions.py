"""Calls with a sum over features: linear maps, convolutions, look-ups, norms, attention, the scan, experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from widthwise.derive.exponents import HALF, ZERO
from widthwise.derive.graph import Group, Shape, atoms, extent
from widthwise.derive.laws import NORMAL, ONES, TAPS, UNIT_NORMAL, ZEROS
from widthwise.verify.trace.axes import Dimension, Piece, identify, new, resolved
from widthwise.verify.trace.context import Axes, Emitter, Key, Value, rule
from widthwise.verify.trace.entrywise import summed
from widthwise.verify.trace.sites import Site, Varying, numbers


def _role(emitter: Emitter, site: Site, weight: Site, key: Key) -> str:
    """The parameter behind a weight's argument, as it is stored."""
    name = emitter.pick(site, emitter.value(weight), key)
    if name not in emitter.parameters:
        raise site.refuse("the weight of this call is computed", "use a parameter as it is stored")
    return name


def _biased(emitter: Emitter, site: Site, y: str, bias: Site | None, key: Key, chosen: Sequence[Piece]) -> str:
    if bias is None:
        return y
    shift = _role(emitter, site, bias, key)
    emitter.law(shift, ZEROS)
    return summed(emitter, site, y, shift, tuple(chosen))


def _spread(emitter: Emitter, site: Site, name: str, wanted: Shape) -> str:
    """The tensor with the axes it lacks, which it does not depend on."""
    mine = emitter.shapes[name]
    if mine == wanted:
        return name
    if atoms(mine) == atoms(wanted):
        return emitter.apply(site, "reshape", (name,), shape=wanted)
    lacking = [dim for dim in atoms(wanted) if dim not in atoms(mine)]
    if any(dim.exponent != ZERO for dim in lacking):
        raise site.refuse(f"{name} lacks the axes {', '.join(map(str, lacking))}, which grow")
    return emitter.apply(site, "broadcast", (name,), shape=wanted)


# -- linear maps -----------------------------------------------------------------------------------------------------


def _linear_axes(axes: Axes, site: Site) -> list[list[Dimension]]:
    x, weight = axes.of(site.args[0]), axes.of(site.args[1])
    if len(weight) != 2:
        raise site.refuse("a linear map with a weight that is no matrix")
    identify(x[-1], weight[1])
    if (bias := _bias(site)) is not None:
        identify(axes.of(bias)[0], weight[0])
    return [[*x[:-1], weight[0]]]


def _bias(site: Site) -> Site | None:
    return site.args[2] if len(site.args) > 2 else site.kwargs.get("bias")


@rule("aten.linear", axes=_linear_axes)
def _linear(emitter: Emitter, site: Site) -> list[Value]:
    x, weight = site.args[:2]
    given = emitter.whole(site, x, "a linear map")
    carrier = emitter.readouts.get(site)

    def make(key: Key, chosen: tuple[Piece, ...]) -> str:
        role = _role(emitter, site, weight, key)
        emitter.law(role, NORMAL)
        fan_in = emitter.parameters[role].shape[-1]
        source = _last_group(emitter, site, given, fan_in)
        attrs: dict[str, Any] = {}
        if carrier:
            attrs = (
                {"carrier": role} if carrier == "own" else {"carrier": emitter.names.unique(carrier), "base": "fan_in"}
            )
        y = emitter.apply(site, "linear", (source, role), f"z_{role}" if not carrier else "logits", **attrs)
        return _biased(emitter, site, y, _bias(site), key, chosen)

    return emitter.each(site, make)


def _last_group(emitter: Emitter, site: Site, name: str, group: Group) -> str:
    """The tensor with its last dimension as the axes that a weight sums over."""
    every = atoms(emitter.shapes[name])
    rest = tuple(dim for dim in every if dim not in group.dims)
    return _spread(emitter, site, name, (*(Group((dim,)) for dim in rest), group))


# -- experts ---------------------------------------------------------------------------------------------------------


def _expert_axes(axes: Axes, site: Site) -> list[list[Dimension]]:
    x, weight = (axes.of(each) for each in site.args[:2])
    identify(x[-1], weight[2])
    return [[*x[:-1], weight[1]]]


@rule("widthwise_trace.expert_linear", axes=_expert_axes)
def _expert_linear(emitter: Emitter, site: Site) -> list[Value]:
    x, weight = site.args[:2]
    given = emitter.whole(site, x, "a linear map")

    def make(key: Key, chosen: tuple[Piece, ...]) -> str:
        role = _role(emitter, site, weight, key)
        emitter.law(role, NORMAL)
        return emitter.apply(site, "linear", (given, role), f"z_{role}", experts=True)

    return emitter.each(site, make)


@rule("widthwise_trace.mix", axes=lambda axes, site: [axes.of(site.args[0])])
def _mix(emitter: Emitter, site: Site) -> list[Value]:
    x, weights = (emitter.whole(site, each, "a mixture") for each in site.args[:2])
    return [{frozenset(): emitter.apply(site, "einsum", (x, weights), shape=emitter.shapes[x])}]


# -- products of activations -------------------------------------------------------------------------------------------


def _matmul_axes(axes: Axes, site: Site) -> list[list[Dimension]]:
    a, b = (axes.of(each) for each in site.args[:2])
    if len(a) < 2 or len(b) < 2:
        raise site.refuse("a matrix product with a vector", "write it as an entrywise product and a linear map")
    identify(a[-1], b[-2])
    return [[*axes.broadcast(a[:-2], b[:-2]), a[-2], b[-1]] if len(a) + len(b) > 4 else [a[-2], b[-1]]]


@rule("aten.matmul", "aten.bmm", "aten.mm", axes=_matmul_axes)
def _matmul(emitter: Emitter, site: Site) -> list[Value]:
    a, b = (emitter.whole(site, each, "a matrix product") for each in site.args[:2])
    if a in emitter.parameters or b in emitter.parameters:
        raise site.refuse("a parameter is used as a matrix [in, out]", "use nn.Linear, which stores [out, in]")
    present = {*atoms(emitter.shapes[a]), *atoms(emitter.shapes[b])}

    def make(key: Key, chosen: tuple[Piece, ...]) -> str:
        return emitter.apply(site, "einsum", (a, b), shape=emitter.shape(chosen, present))

    return emitter.each(site, make)


# -- convolutions ------------------------------------------------------------------------------------------------------


def _groups(site: Site) -> Any:
    at = 8 if site.op.startswith("aten.convolution") else 6
    return site.args[at] if len(site.args) > at else site.kwargs.get("groups", 1)


def _depthwise(site: Site) -> bool:
    """One filter a channel."""
    groups = _groups(site)
    channels = site.args[0].shape[-2 if "1d" in site.op else 1]
    values = groups.values if isinstance(groups, Varying) else (groups,) * len(channels)
    if tuple(values) == channels and site.args[1].shape[0] == channels:
        return True
    if any(value != 1 for value in values):
        raise site.refuse("a convolution in groups of several channels")
    return False


def _conv_axes(axes: Axes, site: Site) -> list[list[Dimension]]:
    x, weight = (axes.of(each) for each in site.args[:2])
    spatial = len(weight) - 2
    channels = x[-spatial - 1]
    depthwise = _depthwise(site)
    identify(channels, weight[0] if depthwise else weight[1])
    if (bias := _bias(site)) is not None:
        identify(axes.of(bias)[0], weight[0])
    places = [
        mine if before == after else new(after)
        for mine, before, after in zip(x[-spatial:], site.args[0].shape[-spatial:], site.shape[-spatial:], strict=True)
    ]
    return [[*x[: -spatial - 1], channels if depthwise else weight[0], *places]]


@rule("aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.convolution", axes=_conv_axes)
def _conv(emitter: Emitter, site: Site) -> list[Value]:
    x, weight = site.args[:2]
    depthwise = _depthwise(site)
    if depthwise and len(site.args[1].shape) != 3:
        raise site.refuse("a depthwise convolution over an image")

    def make(key: Key, chosen: tuple[Piece, ...]) -> str:
        role = _role(emitter, site, weight, key)
        if depthwise:
            emitter.law(role, TAPS)
            source = emitter.grouped(site, emitter.pick(site, emitter.value(x), key), chosen)
            y = emitter.apply(site, "conv1d", (source, role), f"z_{role}", gain=3.0**-0.5)
        else:
            emitter.law(role, NORMAL)
            source = emitter.whole(site, x, "a convolution")
            y = emitter.apply(site, "convolution", (source, role), f"z_{role}")
        return _biased(emitter, site, y, _bias(site), key, [each for each in chosen if each.axes])

    return emitter.each(site, make)


# -- look-ups ----------------------------------------------------------------------------------------------------------


@rule("aten.embedding", axes=lambda axes, site: [[*axes.of(site.args[1]), axes.of(site.args[0])[1]]])
def _embedding(emitter: Emitter, site: Site) -> list[Value]:
    role = emitter.whole(site, site.args[0], "a look-up")
    emitter.law(role, UNIT_NORMAL)
    return [{frozenset(): emitter.apply(site, "embedding", (role,), f"x_{role}")}]


# -- norms -------------------------------------------------------------------------------------------------------------


def _norm_axes(axes: Axes, site: Site) -> list[list[Dimension]]:
    x = axes.of(site.args[0])
    for gain in site.inputs[1:]:
        identify(axes.of(gain)[-1], x[-1])
    return [x]


@rule("aten.rms_norm", "aten.layer_norm", "norm.rms_norm", "norm.layer_norm", "norm.l2_norm", axes=_norm_axes)
def _norm(emitter: Emitter, site: Site) -> list[Value]:
    kind = site.op.split(".")[1]
    written_out = site.op.startswith("norm.")
    if not written_out and len(site.args[1]) != 1:
        raise site.refuse("a norm over several dimensions")
    given = [each for each in site.args[1 if written_out else 2 :] if isinstance(each, float)]
    eps = given[0] if given else 1e-6
    gains = [None if written_out else site.args[at] if len(site.args) > at else None for at in (2, 3)]
    x = site.args[0]

    def make(key: Key, chosen: tuple[Piece, ...]) -> str:
        source = emitter.grouped(site, emitter.pick(site, emitter.value(x), key), chosen)
        y = emitter.apply(site, kind, (source,), "", axis=emitter.shapes[source][-1], eps=float(eps))
        gain, bias = gains if kind == "layer_norm" else (gains[0], None)
        if gain is not None:
            role = _role(emitter, site, gain, key)
            emitter.law(role, ONES)
            y = emitter.apply(site, "einsum", (y, role), shape=emitter.shapes[y])
        return _biased(emitter, site, y, bias, key, chosen)

    if any(each.key is not None for each in emitter.keys(emitter.dims(x)[-1:])[0][1]):
        raise site.refuse("a norm over a packed dimension")
    return emitter.each(site, make)


# -- attention and the scan --------------------------------------------------------------------------------------------


def _attention_axes(axes: Axes, site: Site) -> list[list[Dimension]]:
    q, k, v = (axes.of(each) for each in site.args[:3])
    identify(q[-1], k[-1])
    if site.kwargs.get("enable_gqa"):
        _share_heads(axes, q[-3], k[-3], site.args[0].shape[-3], site.args[1].shape[-3])
        _share_heads(axes, q[-3], v[-3], site.args[0].shape[-3], site.args[2].shape[-3])
    else:
        axes.broadcast(q[:-2], k[:-2])
        axes.broadcast(q[:-2], v[:-2])
    axes.heads += [q[-1], v[-1]]
    return [[*q[:-1], v[-1]]]


def _share_heads(axes: Axes, many: Dimension, few: Dimension, count: Sequence[int], of: Sequence[int]) -> None:
    """Consecutive heads of ``many`` share one of ``few``."""
    identify(many, [*few, *new(tuple(a // b for a, b in zip(count, of, strict=True)))])


@rule("aten.scaled_dot_product_attention", axes=_attention_axes)
def _attention(emitter: Emitter, site: Site) -> list[Value]:
    q, k, v = (emitter.whole(site, each, "attention") for each in site.args[:3])
    if any(not each.constant for each in site.inputs[3:]):
        raise site.refuse("the attention mask depends on the data")
    keys = emitter.dims(site.args[0])[-1]
    key_dims = [emitter.names.dim(axis) for axis in resolved(keys)]
    scale = site.kwargs.get("scale")
    values = [1.0] if scale is None else numbers(scale, len(emitter.widths))
    power = -extent(tuple(key_dims)) * HALF if scale is None else emitter.names.power(values, site)
    present = {*atoms(emitter.shapes[q]), *atoms(emitter.shapes[k])}
    heads = tuple(dim for dim in atoms(emitter.shapes[q]) if dim in present and dim not in key_dims)
    groups = tuple(Group((dim,)) for dim in heads)
    scores = emitter.apply(site, "einsum", (q, k), shape=groups)
    factor = float(values[0]) if power == 0 else 1.0
    scores = emitter.apply(
        site, "scale", (scores,), "scores", power=power, carrier=emitter.names.unique("attn_scale"), factor=factor
    )
    weights = emitter.apply(site, "softmax", (scores,))
    (chosen,) = [chosen for _, chosen in emitter.keys(emitter.dims(site))]
    wanted = emitter.shape(chosen, {*heads, *atoms(emitter.shapes[v])})
    return [{frozenset(): emitter.apply(site, "einsum", (weights, v), "o", shape=wanted)}]


def _scan_axes(axes: Axes, site: Site) -> list[list[Dimension]]:
    q, k, v, *gates = (axes.of(each) for each in site.inputs)
    identify(q[-1], k[-1])
    axes.broadcast(q[:-1], k[:-1])
    heads, shared = site.inputs[2].shape[-2], site.inputs[0].shape[-2]
    _share_heads(axes, v[-2], q[-2], heads, shared)
    for gate in gates:
        axes.broadcast(gate[: len(v) - 1], v[:-1])
    axes.heads += [q[-1], v[-1]]
    return [v]


@rule("widthwise_trace.scan", axes=_scan_axes)
def _scan(emitter: Emitter, site: Site) -> list[Value]:
    g, beta, scale, normalize, erase = site.args[3:8]
    q, k, v = (emitter.whole(site, each, "the scan") for each in site.args[:3])
    chosen = [emitter.keys(emitter.dims(each))[0][1] for each in site.args[:3]]
    q, k, v = (emitter.grouped(site, each, at) for each, at in zip((q, k, v), chosen, strict=True))
    return [{frozenset(): scanned(emitter, site, (q, k, v), g, beta, scale, normalize, erase)}]


def scanned(
    emitter: Emitter,
    site: Site,
    qkv: tuple[str, str, str],
    g: Site | None,
    beta: Site | None,
    scale: Any,
    normalize: bool,
    erase: bool,
) -> str:
    """The nodes of a gated delta rule: norms of q and k, decay, the scan, and the place of a multiplier behind it."""
    q, k, v = qkv
    keys = emitter.shapes[k][-1]
    if normalize:
        q, k = (emitter.apply(site, "l2_norm", (each,), axis=keys, eps=1e-6) for each in (q, k))
    gates = []
    if g is not None:
        gates.append(emitter.apply(site, "exp", (emitter.whole(site, g, "a decay"),), "alpha"))
    if beta is not None:
        gates.append(emitter.whole(site, beta, "a writing strength"))
    length = extent(atoms((keys,)))
    power = -length * HALF if scale is None else emitter.names.power(numbers(scale, len(emitter.widths)), site)
    o = emitter.apply(
        site,
        "scan",
        (q, k, v, *gates),
        "o",
        power=power,
        key_scale=scale is None,
        decay=g is not None,
        strength=beta is not None,
        erase=erase,
        state=None,
    )
    if not erase:
        return o
    carrier = emitter.names.unique("o_scale")
    return emitter.apply(site, "scale", (o,), "o_scaled", power=ZERO, carrier=carrier, factor=1.0)
