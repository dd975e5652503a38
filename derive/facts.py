"""Facts: every size the walks find, with the reason and the facts it rests on. A proof is a fact's ancestry."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from sympy import Expr


@dataclass(frozen=True, eq=False)
class Fact:
    """``subject`` has size n^``value``, because of ``because``; ``assumed`` are the assumptions used right here."""

    subject: str
    value: Expr
    because: str
    parents: tuple[Fact, ...] = ()
    assumed: frozenset[str] = frozenset()


def ancestry(*facts: Fact) -> Iterator[Fact]:
    """All facts a conclusion rests on, each once, premises before what follows from them."""
    seen: set[int] = set()
    stack: list[tuple[Fact, bool]] = [(fact, False) for fact in reversed(facts)]
    while stack:
        fact, expanded = stack.pop()
        if expanded:
            yield fact
        elif id(fact) not in seen:
            seen.add(id(fact))
            stack.append((fact, True))
            stack.extend((parent, False) for parent in reversed(fact.parents))


def settled(facts: tuple[Fact, ...], value: Callable[[Expr], Expr]) -> tuple[Fact, ...]:
    """Every fact these rest on, in order, with the knobs in their sizes replaced by their values."""
    done: dict[int, Fact] = {}
    for fact in ancestry(*facts):
        done[id(fact)] = replace(
            fact, value=value(fact.value), parents=tuple(done[id(parent)] for parent in fact.parents)
        )
    return tuple(done.values())
