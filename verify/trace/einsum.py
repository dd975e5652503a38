"""torch.einsum: a linear map where it meets a weight, a product of activations where it meets none."""

from __future__ import annotations

from collections.abc import Sequence

from widthwise.derive.graph import atoms
from widthwise.verify.trace.axes import Dimension, Piece, identify
from widthwise.verify.trace.context import Axes, Emitter, Key, Value, rule
from widthwise.verify.trace.contractions import linear_map
from widthwise.verify.trace.sites import Site


def _letters(site: Site) -> tuple[list[str], str]:
    """The letters of each operand, and of the result; an ellipsis as capital letters of its own.

    Raises:
        DeriveError: for an equation of another kind than two operands, an arrow, no letter twice in one.
    """
    equation = str(site.args[0]).replace(" ", "")
    operands, arrow, out = equation.partition("->")
    given = operands.split(",")
    if len(given) != 2 or not arrow:
        raise site.refuse(f"torch.einsum({equation!r})", "write it for two tensors at a time, with an arrow")
    shapes: Sequence[Site] = site.args[1]
    dots = max(
        (len(x.shape) - len(each) + 3 for each, x in zip(given, shapes, strict=True) if "..." in each), default=0
    )
    spelled = "".join(chr(ord("A") + at) for at in range(dots))
    inputs = []
    for each, x in zip(given, shapes, strict=True):
        own = len(x.shape) - len(each.replace("...", ""))
        inputs.append(each.replace("...", spelled[dots - own :]))
    if any(len(set(each)) < len(each) for each in inputs):
        raise site.refuse(f"torch.einsum({equation!r}) takes a diagonal")
    return inputs, out.replace("...", spelled)


def _axes(axes: Axes, site: Site) -> list[list[Dimension]]:
    inputs, out = _letters(site)
    found: dict[str, Dimension] = {}
    for letters, operand in zip(inputs, site.args[1], strict=True):
        for letter, dimension in zip(letters, axes.of(operand), strict=True):
            if found.get(letter):
                identify(found[letter], dimension)
            else:
                found[letter] = dimension
    return [[found[letter] for letter in out]]


@rule("aten.einsum", axes=_axes)
def _einsum(emitter: Emitter, site: Site) -> list[Value]:
    (one, other), out = _letters(site)
    a, b = site.args[1]
    for x, weight, mine, stored in ((a, b, one, other), (b, a, other, one)):
        if weight.kind == "parameter":
            summed = mine[-1:]
            made = stored.replace(summed, "")
            if len(stored) != 2 or len(made) != 1 or made in mine or out != mine[:-1] + made:
                raise site.refuse("a weight meets another axis than the last", "move that axis to the end first")
            return linear_map(emitter, site, x, weight, None, input_first=stored[0] == summed)
    left, right = (emitter.whole(site, each, "a product") for each in (a, b))
    present = {*atoms(emitter.shapes[left]), *atoms(emitter.shapes[right])}

    def make(key: Key, chosen: tuple[Piece, ...]) -> str:
        return emitter.apply(site, "einsum", (left, right), shape=emitter.shape(chosen, present))

    return emitter.each(site, make)
