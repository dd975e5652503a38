"""Products of trained factors, as trees: what multiplies in one channel, with the nonlinearities between."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from widthwise.derive.laws import Law


@dataclass(frozen=True)
class Factor:
    """A number that one role's steps move: an entry of ``tensor``, which is the role's own or what it makes."""

    role: str
    tensor: str
    law: Law


@dataclass(frozen=True)
class Applied:
    """A nonlinearity of a product."""

    function: str
    of: Product


@dataclass(frozen=True)
class Product:
    """The product of its parts, none of which is a product itself; 1 of none."""

    parts: tuple[Factor | Applied, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.parts)


Tree = Factor | Applied | Product


def product(*trees: Tree) -> Product:
    """Their product, in which products among them are taken apart and those of nothing left out."""
    parts: list[Factor | Applied] = []
    for tree in trees:
        parts += tree.parts if isinstance(tree, Product) else (tree,)
    return Product(tuple(parts))


MOST = 24
"""Parts that a product may have, nested ones too: a value squared forty times over would have 10¹²."""


def within_bounds(tree: Product) -> Product:
    """The product itself or, where it has more parts than may be, its factors, each once, without their functions."""
    return tree if _parts(tree) <= MOST else Product(factors(tree))


def _parts(tree: Tree) -> int:
    match tree:
        case Factor():
            return 1
        case Applied(of=inner):
            return 1 + _parts(inner)
    return sum(_parts(part) for part in tree.parts)


def factors(tree: Tree) -> tuple[Factor, ...]:
    """Every factor, each once, from left to right."""
    match tree:
        case Factor():
            return (tree,)
        case Applied(of=inner):
            return factors(inner)
    return tuple(dict.fromkeys(each for part in tree.parts for each in factors(part)))


_BOUNDED, _STEEPEST = frozenset(("sigmoid", "tanh")), frozenset(("exp",))


def degree(tree: Tree) -> float:
    """By what power a product grows once its factors are large: a bounded function adds nothing, exp any power."""
    match tree:
        case Factor():
            return 1.0
        case Applied(function, inner):
            grows = degree(inner)
            return 0.0 if function in _BOUNDED or not grows else inf if function in _STEEPEST else grows
    return sum(degree(part) for part in tree.parts)


def counted(tree: Tree) -> int:
    """How many factors a product counts for: its degree, or where that is infinite as many as there are."""
    order = degree(tree)
    return len(factors(tree)) if order == inf else round(order)


def ordered(tree: Product, names: dict[Factor, str] | None = None) -> Product:
    """The same product whatever its factors are called, in an order of its own (that given, where parts look alike)."""
    names = {} if names is None else names
    parts: list[Factor | Applied] = []
    for part in sorted(tree.parts, key=_shape):
        match part:
            case Factor(law=law):
                parts.append(Factor("", names.setdefault(part, str(len(names))), law))
            case Applied(function, inner):
                parts.append(Applied(function, ordered(inner, names)))
    return Product(tuple(parts))


def _shape(tree: Tree) -> str:
    """What a tree looks like without its factors' names."""
    match tree:
        case Factor(law=law):
            return f"~{law}"
        case Applied(function, inner):
            return f"{function}({_shape(inner)})"
    return "".join(sorted(map(_shape, tree.parts)))
