"""Calls with a sum over features: linear maps, convolutions, look-ups, norms, attention, the scan, experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from widthwise.derive.exponents import ZERO
from widthwise.derive.graph import Group, Shape, atoms
from widthwise.derive.laws import NORMAL, ONES, TAPS, UNIT_NORMAL, ZEROS
from widthwise.verify.trace.axes import Dimension, Piece, identify, new
from widthwise.verify.trace.clean import family
from widthwise.verify.trace.context import Axes, Emitter, Key, Value, rule
from widthwise.verify.trace.entrywise import summed
from widthwise.verify.trace.sites import Site, Varying

TURNS = ("aten.t", "aten.transpose", "aten.permute", "aten.numpy_T")  # of a matrix, whatever their arguments


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
    return _linear_map_axes(axes, site, site.args[0], site.args[1], _bias(site))


def _linear_map_axes(
    axes: Axes, site: Site, x: Site, weight: Site, bias: Site | None, input_first: bool = False
) -> list[list[Dimension]]:
    given, stored = axes.of(x), axes.of(weight)
    if len(stored) != 2:
        raise site.refuse("a linear map with a weight that is no matrix")
    fan_in, fan_out = stored if input_first else reversed(stored)
    identify(given[-1], fan_in)
    if bias is not None:
        identify(axes.of(bias)[0], fan_out)
    return [[*given[:-1], fan_out]]


def _bias(site: Site) -> Site | None:
    return site.args[2] if len(site.args) > 2 else site.kwargs.get("bias")


@rule("aten.linear", axes=_linear_axes)
def _linear(emitter: Emitter, site: Site) -> list[Value]:
    return linear_map(emitter, site, site.args[0], site.args[1], _bias(site))


def linear_map(
    emitter: Emitter, site: Site, x: Site, weight: Site, bias: Site | None, input_first: bool = False
) -> list[Value]:
    """W x + bias, with W stored as [out, in] or [in, out]."""
    given = emitter.whole(site, x, "a linear map")
    carrier = emitter.readouts.get(site)

    def make(key: Key, chosen: tuple[Piece, ...]) -> str:
        role = _role(emitter, site, weight, key)
        emitter.stored(site, role, input_first)
        emitter.law(role, NORMAL)
        fan_in = emitter.parameters[role].shape[-1]
        source = _last_group(emitter, site, given, fan_in)
        attrs: dict[str, Any] = {}
        if carrier:
            attrs = {"carrier": role if carrier == "own" else emitter.names.unique(carrier)}
        y = emitter.apply(site, "linear", (source, role), f"z_{role}" if not carrier else "logits", **attrs)
        return _biased(emitter, site, y, bias, key, chosen)

    return emitter.each(site, make)


def _addmm_axes(axes: Axes, site: Site) -> list[list[Dimension]]:
    bias, x, weight = site.args[:3]
    if any(site.kwargs.get(scale, 1) != 1 for scale in ("alpha", "beta")):
        raise site.refuse("aten.addmm with factors")
    return _linear_map_axes(axes, site, x, weight, bias, input_first=True)


@rule("aten.addmm", axes=_addmm_axes)
def _addmm(emitter: Emitter, site: Site) -> list[Value]:
    bias, x, weight = site.args[:3]
    return linear_map(emitter, site, x, weight, bias, input_first=True)


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


def matrix(site: Site) -> tuple[Site, bool] | None:
    """The parameter that a product has on its right, and whether it is as it is stored (x @ W) or turned (x @ W.T)."""
    right = site.args[1]
    turned = right.kind == "op" and family(right.op) in TURNS and len(right.shape) == 2
    weight = right.inputs[0] if turned else right
    return (weight, not turned) if weight.kind == "parameter" else None


def _matmul_axes(axes: Axes, site: Site) -> list[list[Dimension]]:
    if (found := matrix(site)) is not None:
        return _linear_map_axes(axes, site, site.args[0], found[0], None, input_first=found[1])
    a, b = (axes.of(each) for each in site.args[:2])
    if len(a) < 2 or len(b) < 2:
        raise site.refuse("a matrix product with a vector", "write it as an entrywise product and a linear map")
    identify(a[-1], b[-2])
    return [[*axes.broadcast(a[:-2], b[:-2]), a[-2], b[-1]] if len(a) + len(b) > 4 else [a[-2], b[-1]]]


@rule("aten.matmul", "aten.bmm", "aten.mm", axes=_matmul_axes)
def _matmul(emitter: Emitter, site: Site) -> list[Value]:
    if (found := matrix(site)) is not None:
        return linear_map(emitter, site, site.args[0], found[0], None, input_first=found[1])
    a, b = (emitter.whole(site, each, "a matrix product") for each in site.args[:2])
    if a in emitter.parameters or b in emitter.parameters:
        raise site.refuse("a parameter is multiplied from the left", "write W x as x @ W.T")
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


def _taps_axes(axes: Axes, site: Site) -> list[list[Dimension]]:
    x, weight = (axes.of(each) for each in site.args)
    identify(x[-1], weight[0])
    return [x]


@rule("taps.conv1d", axes=_taps_axes)
def _taps(emitter: Emitter, site: Site) -> list[Value]:
    x, weight = site.args

    def make(key: Key, chosen: tuple[Piece, ...]) -> str:
        role = _role(emitter, site, weight, key)
        emitter.law(role, TAPS)
        source = emitter.grouped(site, emitter.pick(site, emitter.value(x), key), chosen)
        return emitter.apply(site, "conv1d", (source, role), f"z_{role}", gain=3.0**-0.5)

    return emitter.each(site, make)


# -- look-ups ----------------------------------------------------------------------------------------------------------


@rule("aten.embedding", axes=lambda axes, site: [[*axes.of(site.args[1]), axes.of(site.args[0])[1]]])
def _embedding(emitter: Emitter, site: Site) -> list[Value]:
    role = emitter.whole(site, site.args[0], "a look-up")
    tied = any(each.args[1] is site.args[0] for each in emitter.readouts)
    emitter.law(role, NORMAL if tied else UNIT_NORMAL)  # a tied one without a multiplier is drawn for Θ(1) logits
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


def _batch_norm_axes(axes: Axes, site: Site) -> list[list[Dimension]]:
    x = axes.of(site.args[0])
    for each in site.args[1:3]:
        if each is not None:
            identify(axes.of(each)[0], x[1])
    return [x]


@rule("aten.batch_norm", axes=_batch_norm_axes)
def _batch_norm(emitter: Emitter, site: Site) -> list[Value]:
    x, gain, bias, _, _, training, _, eps = site.args[:8]
    if not training:
        raise site.refuse("a batch norm in evaluation", "trace the model as it trains: .train()")

    def make(key: Key, chosen: tuple[Piece, ...]) -> str:
        y = emitter.apply(site, "batch_norm", (emitter.pick(site, emitter.value(x), key),), eps=float(eps))
        if gain is not None:
            role = _role(emitter, site, gain, key)
            emitter.law(role, ONES)
            y = emitter.apply(site, "einsum", (y, role), shape=emitter.shapes[y])
        return _biased(emitter, site, y, bias, key, [each for each in chosen if each.axes])

    return emitter.each(site, make)
