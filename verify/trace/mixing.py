"""Attention and scans: what mixes tokens, through queries, keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from widthwise.derive.exponents import HALF, ZERO
from widthwise.derive.graph import Group, atoms, extent
from widthwise.verify.trace.axes import Dimension, identify, new, resolved
from widthwise.verify.trace.context import Axes, Emitter, Value, rule
from widthwise.verify.trace.sites import Site, numbers


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
        site, "scale", (scores,), "scores", power=power, carrier=emitter.names.unique("attn_factor"), factor=factor
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
    return [{frozenset(): _scanned(emitter, site, g, beta, scale, normalize, erase)}]


def _scanned(
    emitter: Emitter,
    site: Site,
    g: Site | None,
    beta: Site | None,
    scale: Any,
    normalize: bool,
    erase: bool,
) -> str:
    """The nodes of a gated delta rule: norms of q and k, decay, the scan, and the place of a multiplier behind it."""
    q, k, v = (
        emitter.grouped(site, emitter.whole(site, each, "the scan"), emitter.keys(emitter.dims(each))[0][1])
        for each in site.args[:3]
    )
    keys = emitter.shapes[k][-1]
    if normalize:
        q, k = (emitter.apply(site, "l2_norm", (each,), axis=keys, eps=1e-6) for each in (q, k))
    gates = []
    if g is not None and g.constant:  # the same for all tokens, as zeros are: no gate
        g = None
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
