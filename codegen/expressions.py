"""Pieces of generated Python: expressions that know their precedence, statements laid out as the formatter would."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from widthwise.codegen.text import WIDTH
from widthwise.derive.errors import DeriveError
from widthwise.derive.graph import Dim, Group, Shape, atoms

SUM, PRODUCT, SIGN, ATOM = range(4)


@dataclass(frozen=True)
class Code:
    """An expression. ``call`` is its function and arguments, where it is a call; ``wide`` says that its value has at
    least single precision in a model of any dtype."""

    text: str
    rank: int = ATOM
    call: tuple[str, tuple[str, ...]] | None = None
    wide: bool = False

    def within(self, rank: int) -> str:
        """The text as an operand of an operator of this rank."""
        return self.text if self.rank >= rank else f"({self.text})"


def called(function: str, *arguments: str, wide: bool = False) -> Code:
    return Code(f"{function}({', '.join(arguments)})", ATOM, (function, arguments), wide)


def total(first: Code, *rest: Code) -> Code:
    """A sum, from left to right."""
    text = " + ".join([first.within(SUM), *(each.within(PRODUCT) for each in rest)])
    return Code(text, SUM, wide=first.wide or any(each.wide for each in rest))


def product(a: Code, b: Code) -> Code:
    return Code(f"{a.within(PRODUCT)} * {b.within(SIGN)}", PRODUCT, wide=a.wide or b.wide)


def negative(x: Code) -> Code:
    return Code(f"-{x.within(ATOM)}", SIGN, wide=x.wide)


def regrouped(x: Code, source: Shape, target: Shape, size: Callable[[Dim], str]) -> Code:
    """The same axes, laid out as other runtime axes: one a group."""
    after = 0  # axes behind the ones at hand, already as the target has them
    for old, new in _aligned(source, target):
        last = -1 - after
        if len(old) > 1:
            ends = f"{last - len(old) + 1}" if last == -1 else f"{last - len(old) + 1}, {last}"
            x = Code(f"{x.within(ATOM)}.flatten({ends})", wide=x.wide)
        if len(new) > 1:  # a function, because Tensor.unflatten has no types
            sizes = ", ".join(["-1", *(product_of(group, size) for group in new[1:])])
            x = called("torch.unflatten", x.text, str(last), f"({sizes})", wide=x.wide)
        after += len(new)
    return x


def _aligned(source: Shape, target: Shape) -> Iterator[tuple[Shape, Shape]]:
    """Pairs of as few groups as possible that hold the same axes, from the last to the first."""
    old, new = list(source), list(target)
    while old or new:
        left, right = [old.pop()], [new.pop()]
        while atoms(tuple(left)) != atoms(tuple(right)):
            if len(atoms(tuple(left))) < len(atoms(tuple(right))):
                left.insert(0, old.pop())
            else:
                right.insert(0, new.pop())
        yield tuple(left), tuple(right)


def product_of(group: Group, size: Callable[[Dim], str]) -> str:
    """The number of entries along a group."""
    return " * ".join(size(dim) for dim in group.dims)


def root(size: str) -> str:
    """The inverse square root of a size."""
    return f"({size}) ** -0.5" if " " in size else f"{size}**-0.5"


def statement(target: str, code: Code, indent: int = 8) -> str:
    """``target = code`` on one line, or as a call over three lines or more.

    Raises:
        DeriveError: when names are too long for either.
    """
    lead = " " * indent
    line = f"{lead}{target} = {code.text}"
    if len(line) <= WIDTH:
        return line
    if code.call:
        function, arguments = code.call
        return "\n".join(spread(f"{lead}{target} = {function}(", arguments, ")", indent))
    raise too_long(line)


def spread(opening: str, parts: tuple[str, ...], closing: str, indent: int) -> list[str]:
    """Parts of a call or a signature: together on a line of their own, or one a line."""
    lead, inner = " " * indent, " " * (indent + 4)
    together = inner + ", ".join(parts)
    lines = [together] if len(together) <= WIDTH else [f"{inner}{part}," for part in parts]
    lines = [opening, *lines, lead + closing]
    for line in lines:
        if len(line) > WIDTH:
            raise too_long(line)
    return lines


def too_long(line: str) -> DeriveError:
    return DeriveError(
        f"a generated line has more than {WIDTH} characters: {line.strip()[:80]}…", cure="use shorter names"
    )
