"""Repeated layers, recognized: of each run of equal layers one stays, and stands for the parameters of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from widthwise.verify.trace.clean import living
from widthwise.verify.trace.sites import Site, Varying, replaced


@dataclass
class Folded:
    """What is left; ``carries`` are (input, output) of each repeated block; parameters know all their names."""

    sites: list[Site]
    carries: list[tuple[Site, Site]] = field(default_factory=list)


@dataclass
class _Block:
    prefix: str
    sites: list[Site]
    signature: Any = None
    carried: Site | None = None
    output: Site | None = None


def folded(sites: Sequence[Site]) -> Folded:
    """Fold runs of layers that are equal but for their parameters: ``layers.0``, ``layers.1``; then layers in layers.

    A layer takes part when one tensor flows through it from layer to layer and comes out in the shape it went in.
    """
    result = Folded(list(sites))
    for level in (1, 2, 3):
        while _fold_once(result, level):
            pass
    return result


def _fold_once(result: Folded, level: int) -> bool:
    blocks = _blocks(result.sites, level)
    readers: dict[Site, list[Site]] = {}
    for site in result.sites:
        for each in site.inputs:
            readers.setdefault(each, []).append(site)
    for block in blocks:
        _describe(block, readers)
    for start, end in _chains(blocks):
        chain = blocks[start:end]
        for period in range(1, len(chain) // 2 + 1):
            for at in range(len(chain) - 2 * period + 1):
                kept, gone = chain[at : at + period], chain[at + period : at + 2 * period]
                if [each.signature for each in kept] == [each.signature for each in gone]:
                    count = 2
                    while [each.signature for each in kept] == [
                        each.signature for each in chain[at + count * period : at + (count + 1) * period]
                    ]:
                        count += 1
                    _drop(result, kept, chain[at + period : at + count * period])
                    return True
    return False


def _index_prefix(path: str, level: int) -> str:
    """The path up to its ``level``-th number: ``model.layers.3``."""
    parts = path.split(".")
    places = [at for at, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: places[level - 1] + 1]) if len(places) >= level else ""


def _blocks(sites: Sequence[Site], level: int) -> list[_Block]:
    blocks: list[_Block] = []
    for site in sites:
        if site.kind != "op" or site.constant:
            continue
        prefix = _index_prefix(site.module, level)
        if not blocks or blocks[-1].prefix != prefix:
            blocks.append(_Block(prefix, []))
        blocks[-1].sites.append(site)
    return blocks


def _describe(block: _Block, readers: Mapping[Site, Sequence[Site]]) -> None:
    """Its signature, and the one tensor that flows through it, where there is one."""
    if not block.prefix:
        return
    inside = {site: at for at, site in enumerate(block.sites)}
    carried: dict[Site, int] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, Site):
            if value in inside:
                return ("inside", inside[value])
            if value.kind == "parameter":
                name = value.names[0]
                own = name.startswith(f"{block.prefix}.")
                return ("parameter", name[len(block.prefix) :] if own else name, tuple(value.shape), value.trainable)
            if value.constant:
                if value.kind == "op" and f"{value.module}.".startswith(f"{block.prefix}."):
                    return ("constant", value.op, plain([each for each in value.args if not isinstance(each, Site)]))
                return ("constant", value.name)
            return ("carried", carried.setdefault(value, len(carried)), tuple(value.shape))
        if isinstance(value, list | tuple):
            return tuple(plain(each) for each in value)
        if isinstance(value, dict):
            return tuple((key, plain(each)) for key, each in sorted(value.items()))
        return value.values if isinstance(value, Varying) else repr(value)

    signature = tuple(
        (site.op, plain(site.args), plain(site.kwargs), tuple(map(tuple, site.shapes))) for site in block.sites
    )
    outputs = [
        site for site in block.sites if any(each not in inside and not each.constant for each in readers.get(site, ()))
    ]
    if len(carried) == 1 and len(outputs) == 1:
        block.carried, block.output = next(iter(carried)), outputs[0]
        block.signature = (signature, inside[outputs[0]])


def _chains(blocks: Sequence[_Block]) -> list[tuple[int, int]]:
    """Runs of blocks each of which carries on what the one before put out."""
    chains = []
    start = 0
    for at in range(1, len(blocks) + 1):
        joined = (
            at < len(blocks)
            and blocks[at].signature is not None
            and blocks[at - 1].signature is not None
            and blocks[at].carried is blocks[at - 1].output
        )
        if not joined:
            chains.append((start, at))
            start = at
    return [chain for chain in chains if chain[1] - chain[0] > 1]


def _drop(result: Folded, kept: Sequence[_Block], gone: Sequence[_Block]) -> None:
    first, last, end = kept[0].carried, kept[-1].output, gone[-1].output
    assert first is not None
    assert last is not None
    assert end is not None
    if first.shape != last.shape:
        raise last.refuse("a layer that repeats ends in another shape than it starts in", "report this model")
    for at, block in enumerate(gone):
        model = kept[at % len(kept)]
        for mine, theirs in zip(model.sites, block.sites, strict=True):
            for own, other in zip(mine.inputs, theirs.inputs, strict=True):
                if own.kind == "parameter" and own is not other:
                    own.names += tuple(name for name in other.names if name not in own.names)
    dropped = {site for block in gone for site in block.sites}
    remaining = [site for site in result.sites if site not in dropped]
    for site in remaining:
        site.args, site.kwargs = (
            replaced(part, lambda each: last if each is end else each) for part in (site.args, site.kwargs)
        )
    result.sites = living(remaining)
    carries = [*result.carries, (first, last)]
    result.carries = [(a, last if b is end else b) for a, b in carries if a in result.sites]
    result.carries = list(dict.fromkeys(each for each in result.carries if each[1] in result.sites))
