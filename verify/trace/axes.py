"""Axes of traced tensors, told apart by structure: what a view splits, a cut divides and an op identifies.

An axis has one size for each traced width. Sizes never make two axes the same; only an op that reads both as one does.
A dimension of a tensor is a list of axes laid out row-major. An axis that turns out to be a product or a concatenation
of others is refined in place, so that every tensor that has it, weights included, learns of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod

from widthwise.derive.errors import DeriveError

Sizes = tuple[int, ...]
ROTARY = "make what does it a stand-in (if it is a rotary embedding, one that returns widthwise.verify.trace.rotate(x))"


@dataclass(eq=False)
class Axis:
    """``sizes`` at the traced widths; ``weight``: some parameter has it, so that it is a feature and no token axis.

    ``same`` forwards to the axis this one was identified with; ``factors`` make it up as a product, outermost first;
    ``parts`` as a concatenation, each part a dimension of its own. ``within`` is the concatenation that it is a run of.
    """

    sizes: Sizes
    origin: str = ""
    weight: bool = False
    same: Axis | None = None
    factors: list[Axis] = field(default_factory=list)
    parts: list[list[Axis]] = field(default_factory=list)
    within: Axis | None = None

    @property
    def root(self) -> Axis:
        axis = self
        while axis.same is not None:
            axis = axis.same
        return axis

    @property
    def feature(self) -> bool:
        """Whether a parameter has this axis or a part of it; any other axis counts tokens."""
        axis = self.root
        inside = any(inner.feature for part in axis.parts for inner in part)
        return axis.weight or inside or (axis.within is not None and axis.within.feature)

    def mark(self) -> None:
        """Say that a parameter has this axis, and everything it is made of."""
        axis = self.root
        axis.weight = True
        for each in (*axis.factors, *(inner for part in axis.parts for inner in part)):
            if not each.root.weight:
                each.mark()


Dimension = list[Axis]


def new(sizes: Sizes, origin: str = "", weight: bool = False) -> Dimension:
    """A dimension of one axis; of none where its size is one."""
    return [] if set(sizes) == {1} else [Axis(sizes, origin, weight)]


def resolved(dimension: Dimension) -> Dimension:
    """The axes of a dimension as they are known by now: products expanded, concatenations left."""
    found: Dimension = []
    for axis in dimension:
        root = axis.root
        found += resolved(root.factors) if root.factors else [root]
    return found


def size(dimension: Dimension, widths: int) -> Sizes:
    return tuple(prod(axis.sizes[at] for axis in dimension) for at in range(widths))


def _divides(small: Sizes, large: Sizes) -> bool:
    return all(b % a == 0 for a, b in zip(small, large, strict=True))


def _quotient(large: Sizes, small: Sizes) -> Sizes:
    return tuple(b // a for a, b in zip(small, large, strict=True))


def _split(axis: Axis, outer: Sizes) -> Dimension:
    """Make an axis the product of an outer one and the rest."""
    if axis.parts:
        raise DeriveError(f"a concatenated axis of {_text(axis.sizes)} is viewed as a product over {_text(outer)}")
    axis.factors = [
        Axis(outer, axis.origin, axis.weight),
        Axis(_quotient(axis.sizes, outer), axis.origin, axis.weight),
    ]
    return list(axis.factors)


def regroup(dimensions: Sequence[Dimension], targets: Sequence[Sizes]) -> list[Dimension]:
    """The same axes row-major as dimensions of other sizes: what a view does."""
    queue = [axis for dimension in dimensions for axis in resolved(dimension)]
    groups: list[Dimension] = []
    for target in targets:
        group: Dimension = []
        left = target
        while set(left) != {1}:
            if queue and _divides(queue[0].sizes, left):
                left = _quotient(left, queue[0].sizes)
                group.append(queue.pop(0))
            elif queue and _divides(left, queue[0].sizes):
                queue[0:1] = _split(queue[0], left)
            else:
                have = " × ".join(_text(axis.sizes) for axis in queue)
                raise DeriveError(f"a view to {' × '.join(map(_text, targets))} cuts across axes (left: {have})")
        groups.append(group)
    if queue:
        raise DeriveError(f"a view to {' × '.join(map(_text, targets))} cuts across axes")
    return groups


def identify(a: Dimension, b: Dimension) -> None:
    """Say that two dimensions are one and the same: an op reads them together."""
    left, right = resolved(a), resolved(b)
    while left and right:
        x, y = left[0], right[0]
        if x is y or x.sizes == y.sizes:
            if x is not y:
                _merge(x, y)
            left.pop(0)
            right.pop(0)
        elif _divides(x.sizes, y.sizes):
            right[0:1] = _split(y, x.sizes)
        elif _divides(y.sizes, x.sizes):
            left[0:1] = _split(x, y.sizes)
        else:
            raise DeriveError(f"axes of {_text(x.sizes)} and {_text(y.sizes)} are read together")
    if left or right:
        raise DeriveError("dimensions of different sizes are read together")


def _merge(x: Axis, y: Axis) -> None:
    if x.weight or y.weight:
        x.mark()
        y.mark()
    if not y.parts:
        y.same = x
    elif not x.parts:
        x.same = y
    else:
        mine, theirs = list(flat(x)), list(flat(y))
        while mine and theirs:
            a, b = size(mine[0], len(x.sizes)), size(theirs[0], len(x.sizes))
            if a == b:
                identify(mine.pop(0), theirs.pop(0))
            elif all(p < q for p, q in zip(a, b, strict=True)):
                theirs[0:1] = cut(theirs[0], [a, _minus(b, a)])
            elif all(p > q for p, q in zip(a, b, strict=True)):
                mine[0:1] = cut(mine[0], [b, _minus(a, b)])
            else:
                raise DeriveError(f"concatenations of {_text(x.sizes)} are cut in another order at another width")
        y.same = x


def _minus(a: Sizes, b: Sizes) -> Sizes:
    return tuple(p - q for p, q in zip(a, b, strict=True))


def _plus(a: Sizes, b: Sizes) -> Sizes:
    return tuple(p + q for p, q in zip(a, b, strict=True))


def flat(axis: Axis) -> Iterator[Dimension]:
    """The parts of a concatenation, those of concatenations within it too."""
    for part in axis.root.parts:
        inner = resolved(part)
        if len(inner) == 1 and inner[0].parts:
            yield from flat(inner[0])
        else:
            yield inner


def concatenated(parts: Sequence[Dimension], sizes: Sizes) -> Dimension:
    """One dimension made of several."""
    return [Axis(sizes, parts=[list(part) for part in parts])]


def cut(dimension: Dimension, sizes: Sequence[Sizes]) -> list[Dimension]:
    """A dimension divided into consecutive pieces of these sizes."""
    if len(sizes) == 1:
        return [dimension]
    axes = resolved(dimension)
    if not axes:
        raise DeriveError("an axis of size one is cut")
    first, rest = axes[0], axes[1:]
    inner = size(rest, len(sizes[0]))
    if not all(_divides(inner, each) for each in sizes):
        raise DeriveError(f"a cut at {_text(sizes[0])} runs across axes")
    heads = [_quotient(each, inner) for each in sizes]
    if not first.parts:
        first.parts = [new(each, first.origin, first.weight) for each in heads]
        return [[*part, *rest] for part in first.parts]
    return [[*part, *rest] for part in _grouped(first, heads)]


def _grouped(axis: Axis, targets: Sequence[Sizes]) -> list[Dimension]:
    """Consecutive parts of a concatenation, joined or cut until they have these sizes."""
    queue = list(flat(axis))
    found: list[Dimension] = []
    for target in targets:
        group: list[Dimension] = []
        left = target
        while any(left):
            have = size(queue[0], len(target))
            if all(a <= b for a, b in zip(have, left, strict=True)):
                left = _minus(left, have)
                group.append(queue.pop(0))
            elif all(a > b for a, b in zip(have, left, strict=True)):
                queue[0:1] = cut(queue[0], [left, _minus(have, left)])
            else:
                raise DeriveError("a cut lies elsewhere at another width")
        found.append(group[0] if len(group) == 1 else [Axis(target, parts=group, within=axis)])
    return found


@dataclass(frozen=True)
class Piece:
    """One alternative of a dimension: its axes, and which part of which concatenation it is. ``extent`` counts its
    entries in each period of the whole dimension."""

    axes: tuple[Axis, ...]
    key: tuple[Axis, Sizes] | None = None
    extent: Sizes = ()


def pieces(dimension: Dimension) -> list[Piece]:
    """What a dimension consists of: itself, or the parts of the one concatenation in it. Token axes do not count."""
    axes = [axis for axis in resolved(dimension) if axis.feature]
    packed = [at for at, axis in enumerate(axes) if axis.parts]
    if not packed:
        return [Piece(tuple(axes))]
    if len(packed) > 1:
        raise DeriveError("a dimension is made of two concatenations", cure=ROTARY)
    at = packed[0]
    axis = axes[at]
    offset: Sizes = (0,) * len(axis.sizes)
    inner = size(axes[at + 1 :], len(offset))
    found = []
    for part in flat(axis):
        extent = size(part, len(offset))
        if any(each.parts for each in part):
            raise DeriveError("a concatenation within a product is concatenated again", cure=ROTARY)
        rows = tuple(p * q for p, q in zip(extent, inner, strict=True))
        found.append(Piece((*axes[:at], *part, *axes[at + 1 :]), (axis, offset), rows))
        offset = _plus(offset, extent)
    return found


def _text(sizes: Sizes) -> str:
    return str(sizes[0]) if len(set(sizes)) == 1 else "/".join(map(str, sizes))
