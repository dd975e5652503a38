"""Depthwise convolutions written out tap by tap, recognized: Σ_t x[time + t] · w[channel, t] becomes one call."""

from __future__ import annotations

from collections.abc import Sequence

from widthwise.verify.trace.clean import family, living
from widthwise.verify.trace.sites import Site, replaced


def with_taps(sites: Sequence[Site]) -> list[Site]:
    """The same calls, with ``taps.conv1d`` of (x, weight [channels, taps]) where a sum over all taps was written."""
    stands: dict[Site, Site] = {}
    found = []
    for site in sites:
        site.args, site.kwargs = (
            replaced(part, lambda each: stands.get(each, each)) for part in (site.args, site.kwargs)
        )
        terms = _terms(site)
        whole = _whole(terms) if len(terms) > 1 else None
        if whole is not None:
            made = Site(site.name, "taps.conv1d", "op", whole, {}, site.shapes, site.where, site.module)
            stands[site] = made
            site = made
        found.append(site)
    return living(found)


def _terms(site: Site) -> list[tuple[Site, Site]]:
    """The (x, w) of Σ x·w."""
    op = family(site.op)
    if op == "aten.mul" and len(site.inputs) == 2:
        return [(site.inputs[0], site.inputs[1])]
    if op == "aten.addcmul" and not site.kwargs and (rest := _terms(site.inputs[0])):
        return [*rest, (site.inputs[1], site.inputs[2])]
    if op == "aten.add" and len(site.inputs) == 2 and "alpha" not in site.kwargs:
        left, right = map(_terms, site.inputs)
        return [*left, *right] if left and right else []
    return []


def _whole(terms: Sequence[tuple[Site, Site]]) -> tuple[Site, Site] | None:
    """(x, weight) where each term is a shift of one x in time times one tap, and every tap is there."""
    source: Site | None = None
    weight: Site | None = None
    taps = []
    for x, tap in terms:
        if family(x.op) == "aten.slice":
            time = x.args[1] if len(x.args) > 1 else 0
            if not isinstance(time, int) or time % len(x.shape) == len(x.shape) - 1:
                return None
            x = x.inputs[0]
        if family(tap.op) != "aten.select" or tap.args[1] not in (1, -1) or not isinstance(tap.args[2], int):
            return None
        table = tap.inputs[0]
        if table.kind != "parameter" or len(table.shape) != 2 or (weight or table) is not table:
            return None
        if (source or x) is not x:
            return None
        source, weight = x, table
        taps.append(tap.args[2] % table.shape[1][0])
    if source is None or weight is None or any(sorted(taps) != list(range(count)) for count in weight.shape[1]):
        return None
    while family(source.op) in ("aten.pad", "aten.constant_pad_nd"):
        source = source.inputs[0]
    return source, weight
