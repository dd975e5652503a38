"""Entrywise calls: nonlinearities, products, sums, masks; and reductions over tokens."""

from __future__ import annotations

from typing import Any

from widthwise.derive.exponents import ZERO
from widthwise.derive.graph import atoms
from widthwise.derive.laws import DECAY_RATE, ONES, TIME_STEP, ZEROS
from widthwise.derive.ops import OPS
from widthwise.verify.trace.axes import ROTARY, Dimension, Piece, new, resolved
from widthwise.verify.trace.context import Axes, Emitter, Key, Value, rule
from widthwise.verify.trace.sites import Site, Varying, numbers


def _same(axes: Axes, site: Site) -> list[list[Dimension]]:
    return [axes.of(site.inputs[0])]


def _broadcast(axes: Axes, site: Site) -> list[list[Dimension]]:
    return [axes.broadcast(*(axes.of(each) for each in site.inputs))]


def generic(op: str) -> Any:
    """A rule for an op of one input that keeps its shape, named in the engine's registry by its ATen name."""

    def emit(emitter: Emitter, site: Site) -> list[Value]:
        if op == "exp":
            for name in emitter.value(site.inputs[0]).values():
                emitter.law(name, DECAY_RATE)
        if op == "softmax":
            _check_softmax(emitter, site)
        return emitter.entrywise(site, op)

    return emit


def _check_softmax(emitter: Emitter, site: Site) -> None:
    """Probabilities over tokens or over an axis of one tensor: what is normalized is whole."""
    if len(emitter.value(site.inputs[0])) != 1:
        raise site.refuse("a softmax over a packed tensor")


for _name in ("silu", "gelu", "relu", "tanh", "sigmoid", "softplus", "exp", "softmax"):
    rule(*(name for name in OPS[_name].aten), axes=_same)(generic(_name))


# -- products ------------------------------------------------------------------------------------------------------


def _numbers(site: Site) -> list[Any]:
    return [each for each in site.args[:2] if isinstance(each, int | float | Varying)]


def _picked(emitter: Emitter, site: Site, source: Site) -> list[Value]:
    """One operand, as it is."""
    return emitter.each(site, lambda key, _: emitter.pick(site, emitter.value(source), key))


@rule("aten.neg", axes=_same)
def _neg(emitter: Emitter, site: Site) -> list[Value]:
    return emitter.scaled(site, site.inputs[0], [-1.0] * len(emitter.widths))


@rule("aten.mul", "aten.div", "aten.true_divide", axes=_broadcast)
def _mul(emitter: Emitter, site: Site) -> list[Value]:
    divides = not site.op.startswith("aten.mul")
    if given := _numbers(site):
        if divides and isinstance(site.args[0], int | float | Varying):
            raise site.refuse("a number is divided by a tensor")
        values = numbers(given[0], len(emitter.widths))
        return emitter.scaled(site, site.inputs[0], [1 / each if divides else each for each in values])
    a, b = site.inputs
    for one, other in ((a, b), (b, a)):
        if other.constant and not other.number:
            return _picked(emitter, site, one)
    if divides or a.constant or b.constant:
        what = "a tensor is divided by another" if divides else "a computed constant multiplies a tensor"
        raise site.refuse(what, "" if divides else ROTARY)
    for one, other in ((a, b), (b, a)):
        if any(name not in emitter.parameters for name in emitter.value(other).values()):
            for name in emitter.value(one).values():
                emitter.law(name, ONES)

    def make(key: Key, chosen: tuple[Piece, ...]) -> str:
        return product(emitter, site, a, b, key, chosen)

    return emitter.each(site, make)


def product(emitter: Emitter, site: Site, a: Site, b: Site, key: Key, chosen: tuple[Piece, ...]) -> str:
    """An entrywise product of the pieces that ``key`` chooses."""
    one, other = (emitter.pick(site, emitter.value(each), key) for each in (a, b))
    present = (*atoms(emitter.shapes[one]), *atoms(emitter.shapes[other]))
    return emitter.apply(site, "einsum", (one, other), shape=emitter.shape(chosen, present))


# -- sums ----------------------------------------------------------------------------------------------------------


@rule("aten.add", "aten.sub", axes=_broadcast)
def _add(emitter: Emitter, site: Site) -> list[Value]:
    minus = site.op.startswith("aten.sub")
    if "alpha" in site.kwargs and site.kwargs["alpha"] != 1:
        raise site.refuse("a sum with alpha", "write x + alpha * y")
    if _numbers(site):
        return _shifted(emitter, site)
    a, b = site.inputs
    for one, other in ((a, b), (b, a)):
        if other.constant and _is_mask(emitter, site, other):
            return _picked(emitter, site, one)
    if a.constant or b.constant:
        raise site.refuse("a computed constant is added", "pass it as an input of the model, or make it a parameter")
    law = TIME_STEP if any(each.op.startswith("aten.softplus") for each in emitter.readers.get(site, ())) else ZEROS
    for one, other in ((a, b), (b, a)):
        if any(name not in emitter.parameters for name in emitter.value(other).values()):
            for name in emitter.value(one).values():
                emitter.law(name, law)

    def make(key: Key, chosen: tuple[Piece, ...]) -> str:
        one, other = (emitter.pick(site, emitter.value(each), key) for each in (a, b))
        if minus:
            other = emitter.apply(site, "scale", (other,), power=ZERO, carrier=None, factor=-1.0)
        return summed(emitter, site, one, other, chosen)

    return emitter.each(site, make)


def summed(emitter: Emitter, site: Site, one: str, other: str, chosen: tuple[Piece, ...]) -> str:
    """A sum: into a residual stream where one of the two was made from the other, plain elsewhere."""
    present = (*atoms(emitter.shapes[one]), *atoms(emitter.shapes[other]))
    wanted = emitter.shape(chosen, present)
    one, other = (
        emitter.grouped(site, each, chosen)
        if set(atoms(emitter.shapes[each])) == set(atoms(wanted))
        else emitter.apply(site, "broadcast", (emitter.grouped(site, each, chosen),), shape=wanted)
        for each in (one, other)
    )
    if one in emitter.ancestors.get(other, ()):
        return emitter.apply(site, "residual", (one, other))
    if other in emitter.ancestors.get(one, ()):
        return emitter.apply(site, "residual", (other, one))
    return emitter.apply(site, "add", (one, other))


def _shifted(emitter: Emitter, site: Site) -> list[Value]:
    """A number plus a parameter is that parameter, stored as what is added to the number."""
    value = emitter.value(site.inputs[0])
    if any(name not in emitter.parameters for name in value.values()):
        raise site.refuse("a number is added to an activation")
    for name in value.values():
        emitter.law(name, ZEROS)
    return [dict(value)]


def _is_mask(emitter: Emitter, site: Site, other: Site) -> bool:
    """Whether a constant is added to scores alone, on their way to a softmax."""
    features = [axis for dimension in emitter.dims(other) for axis in resolved(dimension) if axis.feature]
    readers = emitter.readers.get(site, ())
    return not features and bool(readers) and all("softmax" in each.op for each in readers)


@rule("aten.masked_fill", axes=_same)
def _masked(emitter: Emitter, site: Site) -> list[Value]:
    if not site.args[1].constant:
        raise site.refuse("a mask depends on the data")
    return [dict(emitter.value(site.inputs[0]))]


# -- reductions over tokens -----------------------------------------------------------------------------------------


def _reduced(axes: Axes, site: Site) -> list[list[Dimension]]:
    mine = axes.of(site.inputs[0])
    given = site.args[1] if len(site.args) > 1 else None
    dims = {at % len(mine) for at in (given if isinstance(given, list | tuple) else [given])} if given else set()
    if given is None:
        dims = set(range(len(mine)))
    keep = site.args[2] if len(site.args) > 2 else site.kwargs.get("keepdim", False)
    return [[[] if at in dims else each for at, each in enumerate(mine) if keep or at not in dims]]


@rule("aten.mean", "aten.sum", axes=_reduced)
def _mean(emitter: Emitter, site: Site) -> list[Value]:
    before = {axis for dimension in emitter.dims(site.inputs[0]) for axis in resolved(dimension) if axis.feature}
    after = {axis for dimension in emitter.dims(site) for axis in resolved(dimension)}
    if before - after:
        raise site.refuse("a feature axis is summed without a weight")
    return [dict(emitter.value(site.inputs[0]))]


def _pooled(axes: Axes, site: Site) -> list[list[Dimension]]:
    """Channels stay; places are pooled."""
    mine = axes.of(site.inputs[0])
    spatial = 2 if "2d" in site.op else 1 if "1d" in site.op else 3
    return [[*mine[:-spatial], *(new(sizes) for sizes in site.shape[-spatial:])] for _ in site.shapes]


@rule(
    *(f"aten.{kind}_pool{d}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for d in (1, 2, 3)),
    *(f"aten.max_pool{d}d_with_indices" for d in (2, 3)),
    axes=_pooled,
)
def _pool(emitter: Emitter, site: Site) -> list[Value]:
    return [dict(emitter.value(site.inputs[0])) for _ in site.shapes]


@rule("aten.cross_entropy_loss", axes=lambda axes, site: [[]])
def _loss(emitter: Emitter, site: Site) -> list[Value]:
    logits = emitter.whole(site, site.args[0], "a loss")
    return [{frozenset(): emitter.apply(site, "cross_entropy", (logits,), "loss")}]
