"""The architectures, by name: one builder function each."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping

from widthwise.derive.architectures.linear_attention import deltanet, gated_deltanet, gated_linear_attention, mamba2
from widthwise.derive.architectures.mlp import mlp
from widthwise.derive.architectures.transformer import transformer
from widthwise.derive.errors import DeriveError, unknown_name
from widthwise.derive.graph import Graph

ARCHITECTURES: Mapping[str, Callable[..., Graph]] = {
    "mlp": mlp,
    "transformer": transformer,
    "gated_deltanet": gated_deltanet,
    "deltanet": deltanet,
    "gated_linear_attention": gated_linear_attention,
    "mamba2": mamba2,
}


def options(name: str) -> dict[str, object]:
    """The options of an architecture with their defaults.

    Raises:
        DeriveError: when there is no such architecture.
    """
    if name not in ARCHITECTURES:
        raise unknown_name("architecture", name, list(ARCHITECTURES))
    signature = inspect.signature(ARCHITECTURES[name])
    found = {each.name: each.default for each in signature.parameters.values()}
    return {key: value for key, value in found.items() if key not in ("name", "title")}  # a variant's own, no choices


def architecture(name: str, **chosen: object) -> Graph:
    """The graph of a named architecture.

    Raises:
        DeriveError: for an unknown name, an option it does not have, or a value of the wrong kind.
    """
    known = options(name)
    for option, value in chosen.items():
        if option not in known:
            raise unknown_name(f"option of {name}", option, list(known))
        if type(value) is not type(known[option]):
            raise DeriveError(
                f"option {option} of {name} cannot be {value!r}",
                cure=f"it is of the kind of its default, {known[option]!r}",
            )
    return ARCHITECTURES[name](**chosen)
