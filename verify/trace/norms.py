"""Norms written out in primitives, recognized: x · rsqrt(mean(x²) + eps) and its kin become one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from widthwise.verify.trace.clean import family, living
from widthwise.verify.trace.sites import Site, replaced


def with_norms(sites: Sequence[Site]) -> list[Site]:
    """The same calls, with ``norm.rms_norm``, ``norm.l2_norm`` and ``norm.layer_norm`` of (x, eps) where primitives
    computed them over the last dimension."""
    stands: dict[Site, Site] = {}
    found = []
    for site in sites:
        site.args, site.kwargs = (
            replaced(part, lambda each: stands.get(each, each)) for part in (site.args, site.kwargs)
        )
        norm = _norm(site)
        if norm is not None:
            kind, x, eps = norm
            made = Site(
                site.name, f"norm.{kind}", "op", (x, eps), {}, site.shapes, site.where, site.module, number=True
            )
            stands[site] = made
            site = made
        found.append(site)
    return living(found)


def _norm(site: Site) -> tuple[str, Site, Any] | None:
    op = family(site.op)
    if op not in ("aten.mul", "aten.div") or len(site.inputs) != 2:
        return None
    for x, factor in (site.inputs, reversed(site.inputs)) if op == "aten.mul" else (site.inputs,):
        power, factor = (1, factor) if op == "aten.div" else (-1, factor)
        squares = _under_root(_unbroadcast(factor), power)
        if squares is None:
            continue
        summed, eps = squares
        kind = {"aten.mean": "rms_norm", "aten.sum": "l2_norm"}.get(family(summed.op))
        if kind is None and family(summed.op) == "aten.linalg_vector_norm":
            if summed.inputs[0] is x and _over_last(summed, 2):
                return "l2_norm", x, eps
            continue
        if kind is None or not _over_last(summed, 1) or _squared(summed.inputs[0]) is not x:
            continue
        centred = _centred(x)
        if centred is not None and kind == "rms_norm":
            return "layer_norm", centred, eps
        return kind, x, eps
    return None


def _unbroadcast(site: Site) -> Site:
    while family(site.op) in ("aten.expand", "aten.expand_as"):
        site = site.inputs[0]
    return site


def _under_root(site: Site, power: int) -> tuple[Site, Any] | None:
    """(sum or mean of squares, eps) where the site is (that + eps)^(power/2), or max(length, eps)."""
    op = family(site.op)
    if power == -1 and op == "aten.reciprocal":
        return _under_root(site.inputs[0], 1)
    if op == "aten.pow" and len(site.args) > 1 and site.args[1] in (0.5, -0.5):
        return _with_eps(site.inputs[0]) if site.args[1] == power / 2 else None
    if (power, op) in ((-1, "aten.rsqrt"), (1, "aten.sqrt")):
        return _with_eps(site.inputs[0])
    if power == 1 and op in ("aten.clamp_min", "aten.add", "aten.linalg_vector_norm"):
        base, eps = _with_eps(site) if op == "aten.add" else (site, site.args[1] if op == "aten.clamp_min" else 0.0)
        base = site.inputs[0] if op == "aten.clamp_min" else base
        if family(base.op) == "aten.linalg_vector_norm":
            return base, eps
        if family(base.op) == "aten.sqrt":
            return _with_eps(base.inputs[0])[0], eps
    return None


def _with_eps(site: Site) -> tuple[Site, Any]:
    if family(site.op) in ("aten.add", "aten.clamp_min", "aten.clamp") and len(site.inputs) == 1:
        eps = next(each for each in site.args if not isinstance(each, Site))
        return site.inputs[0], eps
    return site, 0.0


def _squared(site: Site) -> Site | None:
    op = family(site.op)
    if op == "aten.pow" and site.args[1] in (2, 2.0):
        return site.inputs[0]
    if op == "aten.mul" and len(site.inputs) == 2 and site.inputs[0] is site.inputs[1]:
        return site.inputs[0]
    return site.inputs[0] if op == "aten.square" else None


def _over_last(site: Site, at: int) -> bool:
    """Whether a reduction runs over the last dimension and keeps it."""
    dims = site.args[at] if len(site.args) > at else site.kwargs.get("dim")
    keeps = site.args[at + 1] if len(site.args) > at + 1 else site.kwargs.get("keepdim", False)
    last = len(site.inputs[0].shape) - 1
    return bool(keeps) and (dims if isinstance(dims, list | tuple) else [dims]) in ([-1], [last])


def _centred(site: Site) -> Site | None:
    """y, where the site is y - mean(y)."""
    if family(site.op) != "aten.sub" or len(site.inputs) != 2:
        return None
    y, mean = site.inputs
    centred = family(mean.op) == "aten.mean" and mean.inputs[0] is y and _over_last(mean, 1)
    return y if centred else None
