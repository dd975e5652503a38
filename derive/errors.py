"""The one error a user of the engine meets: what is wrong, where, and what to do about it."""

from __future__ import annotations


class DeriveError(ValueError):
    """A description, an assumption or a request that has no derivation.

    ``where`` names the node and the caller's line, ``cure`` says what to change.
    """

    def __init__(self, what: str, *, where: str = "", cure: str = "") -> None:
        self.what, self.where, self.cure = what, where, cure
        super().__init__(" ".join(part for part in (what, where and f"[{where}]", cure and f"→ {cure}") if part))


def unknown_name(kind: str, name: str, known: list[str]) -> DeriveError:
    """The error for a name that is in no registry, with the names that are."""
    return DeriveError(f"no {kind} is called {name!r}", cure=f"known: {', '.join(sorted(known))}")
