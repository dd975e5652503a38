"""Calls that move entries and change none: views, permutations, cuts, concatenations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from widthwise.verify.trace.axes import (
    ROTARY,
    Dimension,
    Sizes,
    concatenated,
    cut,
    identify,
    new,
    pieces,
    regroup,
    resolved,
)
from widthwise.verify.trace.context import Axes, Emitter, Value, rule
from widthwise.verify.trace.sites import Site, Varying


def _argument(site: Site, at: int, name: str, default: Any = None) -> Any:
    return site.args[at] if len(site.args) > at else site.kwargs.get(name, default)


def _integer(site: Site, at: int, name: str, default: int) -> int:
    value = _argument(site, at, name, default)
    if not isinstance(value, int):
        raise site.refuse(f"{name} depends on the width")
    return value


def _moved(emitter: Emitter, site: Site) -> list[Value]:
    """Entries that stay what they are: the same tensors."""
    return [dict(emitter.value(site.inputs[0]))]


# -- views ---------------------------------------------------------------------------------------------------------


def _view(axes: Axes, site: Site) -> list[list[Dimension]]:
    return [regroup(axes.of(site.inputs[0]), site.shape)]


rule(
    "aten.view",
    "aten.reshape",
    "aten._unsafe_view",
    "aten.flatten",
    "aten.unflatten",
    axes=_view,
)(_moved)


def _permuted(axes: Axes, site: Site) -> list[list[Dimension]]:
    mine = axes.of(site.inputs[0])
    order = list(range(len(mine)))
    if site.op.startswith(("aten.transpose", "aten.swapaxes")):
        a, b = _integer(site, 1, "dim0", 0), _integer(site, 2, "dim1", 1)
        order[a], order[b] = order[b], order[a]
    elif site.op.startswith("aten.permute"):
        order = list(site.args[1])
    else:
        order.reverse()
    return [[mine[at] for at in order]]


rule("aten.permute", "aten.transpose", "aten.swapaxes", "aten.t", "aten.numpy_T", axes=_permuted)(_moved)


def _unit_axes(axes: Axes, site: Site) -> list[list[Dimension]]:
    """Squeezing and unsqueezing: dimensions of size one come and go."""
    rest = [dimension for dimension in axes.of(site.inputs[0]) if dimension]
    return [[[] if set(sizes) == {1} else rest.pop(0) for sizes in site.shape]]


rule("aten.squeeze", "aten.unsqueeze", axes=_unit_axes)(_moved)


def _expanded(axes: Axes, site: Site) -> list[list[Dimension]]:
    mine = axes.of(site.inputs[0])
    padded: list[Dimension] = [[] for _ in range(len(site.shape) - len(mine))] + mine
    return [[have or new(sizes) for have, sizes in zip(padded, site.shape, strict=True)]]


rule("aten.expand", "aten.expand_as", "aten.broadcast_to", axes=_expanded)(_moved)


def _repeated(axes: Axes, site: Site) -> list[list[Dimension]]:
    """Copies of entries: interleaved, the copies are the inner axis; of whole tensors, the outer one."""
    mine = axes.of(site.inputs[0])
    given = site.inputs[0].shape
    padded: list[Dimension] = [[] for _ in range(len(site.shape) - len(mine))] + mine
    out = []
    for at, (dimension, sizes) in enumerate(zip(padded, site.shape, strict=True)):
        before = given[at - len(site.shape)] if at >= len(site.shape) - len(mine) else (1,) * axes.widths
        copies = new(tuple(b // a for a, b in zip(before, sizes, strict=True)))
        out.append([*dimension, *copies] if "interleave" in site.op else [*copies, *dimension])
    return [out]


rule("aten.repeat_interleave", "aten.repeat", axes=_repeated)(_moved)


def _padded(axes: Axes, site: Site) -> list[list[Dimension]]:
    mine = axes.of(site.inputs[0])
    return [
        [
            dimension if before == after else new(after)
            for dimension, before, after in zip(mine, site.inputs[0].shape, site.shape, strict=True)
        ]
    ]


@rule("aten.pad", "aten.constant_pad_nd", axes=_padded)
def _pad(emitter: Emitter, site: Site) -> list[Value]:
    for dimension, before, after in zip(emitter.dims(site.inputs[0]), site.inputs[0].shape, site.shape, strict=True):
        if before != after and any(axis.feature for axis in resolved(dimension)):
            raise site.refuse("a feature axis is padded")
    return _moved(emitter, site)


# -- cuts ----------------------------------------------------------------------------------------------------------


def _place(site: Site, at: int) -> int:
    dim = _integer(site, at, "dim", 0)
    return dim % len(site.inputs[0].shape)


def _cut(axes: Axes, site: Site, dim: int, sizes: Sequence[Sizes], kept: Sequence[int]) -> list[list[Dimension]]:
    mine = axes.of(site.inputs[0])
    parts = cut(mine[dim], sizes)
    axes.cuts[site] = (parts, list(kept))
    return [[*mine[:dim], parts[at], *mine[dim + 1 :]] for at in kept]


def _split(axes: Axes, site: Site) -> list[list[Dimension]]:
    dim = _place(site, 2)
    return _cut(axes, site, dim, [shape[dim] for shape in site.shapes], range(len(site.shapes)))


def _sliced(axes: Axes, site: Site) -> list[list[Dimension]]:
    dim = _place(site, 1)
    if _integer(site, 4, "step", 1) != 1:
        raise site.refuse("every second entry of an axis is taken", ROTARY)
    length, taken = site.inputs[0].shape[dim], site.shape[dim]
    given = _argument(site, 2, "start", None) or 0
    starts = given.values if isinstance(given, Varying) else (given,) * axes.widths
    start = tuple(min(int(s) % n if s < 0 else int(s), n) for s, n in zip(starts, length, strict=True))
    return _window(axes, site, dim, start, length, taken)


def _window(axes: Axes, site: Site, dim: int, start: Sizes, length: Sizes, taken: Sizes) -> list[list[Dimension]]:
    rest = tuple(n - s - t for n, s, t in zip(length, start, taken, strict=True))
    if any(len({bool(each) for each in sizes}) > 1 for sizes in (start, taken, rest)) or not all(taken):
        raise site.refuse("what is cut off is empty at one width and not at another")
    sizes = [each for each in (start, taken, rest) if any(each)]
    return _cut(axes, site, dim, sizes, [1 if any(start) else 0])


def _selected(axes: Axes, site: Site) -> list[list[Dimension]]:
    dim, index = _place(site, 1), site.args[2]
    length = site.inputs[0].shape[dim]
    if set(length) == {1}:
        mine = axes.of(site.inputs[0])
        axes.cuts[site] = ([mine[dim]], [0])
        return [[*mine[:dim], *mine[dim + 1 :]]]
    if not isinstance(index, int):
        raise site.refuse("the entry that is selected depends on the width")
    start = tuple(index % n for n in length)
    (kept,) = _window(axes, site, dim, start, length, (1,) * axes.widths)
    return [[*kept[:dim], *kept[dim + 1 :]]]


def _unbound(axes: Axes, site: Site) -> list[list[Dimension]]:
    dim = _place(site, 1)
    ones = (1,) * axes.widths
    count = len(site.shapes)
    kept = _cut(axes, site, dim, [ones] * count, range(count))
    return [[*each[:dim], *each[dim + 1 :]] for each in kept]


def _taken(emitter: Emitter, site: Site) -> list[Value]:
    """The pieces of the input that lie in each output, under the names they have there."""
    parts, kept = emitter.axes.cuts[site]
    value = emitter.value(site.inputs[0])
    inner = [pieces(part) for part in parts]
    dim = _cut_dim(emitter, site)
    outer = pieces(emitter.dims(site.inputs[0])[dim])
    if len(outer) == 1 and outer[0].key is None:  # along tokens
        return [dict(value) for _ in kept]
    if sum(map(len, inner)) != len(outer):
        raise site.refuse(f"a tensor packed of {len(outer)} pieces is cut into {sum(map(len, inner))}")
    made = []
    for at in kept:
        start = sum(map(len, inner[:at]))
        found: Value = {}
        for before, after in zip(outer[start : start + len(inner[at])], inner[at], strict=True):
            for key, name in value.items():
                if before.key in key:
                    rest = key - {before.key}
                    found[rest | {after.key} if after.key is not None else rest] = name
        made.append(found)
    return made


def _cut_dim(emitter: Emitter, site: Site) -> int:
    return _place(site, 2 if site.op.startswith(("aten.split", "aten.chunk")) else 1)


rule("aten.split", "aten.split_with_sizes", "aten.chunk", axes=_split)(_taken)
rule("aten.slice", "aten.narrow", axes=_sliced)(_taken)
rule("aten.select", axes=_selected)(_taken)
rule("aten.unbind", axes=_unbound)(_taken)


@rule("getitem", axes=lambda axes, site: [axes.known[site.inputs[0]][site.args[1]]])
def _getitem(emitter: Emitter, site: Site) -> list[Value]:
    return [emitter.values[site.inputs[0]][site.args[1]]]


# -- concatenation -------------------------------------------------------------------------------------------------


def _cat_dim(site: Site) -> int:
    return _integer(site, 1, "dim", 0) % len(site.shape)


def _joined(axes: Axes, site: Site) -> list[list[Dimension]]:
    dim = _cat_dim(site)
    given = [axes.of(each) for each in site.args[0]]
    out = []
    for at, sizes in enumerate(site.shape):
        if at == dim:
            out.append(concatenated([each[at] for each in given], sizes))
        else:
            for other in given[1:]:
                identify(given[0][at], other[at])
            out.append(given[0][at])
    return [out]


@rule("aten.cat", axes=_joined)
def _cat(emitter: Emitter, site: Site) -> list[Value]:
    dim = _cat_dim(site)
    whole = pieces(emitter.dims(site)[dim])
    found: Value = {}
    if len(whole) == 1 and whole[0].key is None:
        raise site.refuse("different tensors are put side by side as tokens")
    at = 0
    for source in site.args[0]:
        if source.constant:
            raise site.refuse("a constant is part of a concatenation")
        for piece in pieces(emitter.dims(source)[dim]):
            for key, name in emitter.value(source).items():
                if piece.key is None or piece.key in key:
                    rest = key - {piece.key} if piece.key is not None else key
                    found[rest | {whole[at].key}] = name  # type: ignore[arg-type]
            at += 1
    return [found]
