"""From traced calls to the engine's graph."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

from widthwise.derive.errors import DeriveError
from widthwise.derive.graph import Graph
from widthwise.derive.ops import OPS
from widthwise.verify.trace.axes import identify, resolved
from widthwise.verify.trace.clean import cleaned, family
from widthwise.verify.trace.context import RULES, Axes, Emitter, Rule, Value
from widthwise.verify.trace.contractions import matrix
from widthwise.verify.trace.entrywise import generic
from widthwise.verify.trace.fold import folded
from widthwise.verify.trace.names import Names
from widthwise.verify.trace.norms import with_norms
from widthwise.verify.trace.sites import Site, tensors
from widthwise.verify.trace.taps import with_taps

VIEWS = ("view", "reshape", "slice", "select", "squeeze", "unsqueeze", "transpose", "permute")


def lowered(
    sites: Sequence[Site], parameters: Sequence[str], widths: tuple[int, ...], name: str, title: str
) -> tuple[Graph, list[str]]:
    """The graph, and warnings."""
    layers = folded(with_taps(with_norms(cleaned(sites))))
    axes = _axes(layers.sites, widths)
    for start, end in layers.carries:
        for before, after in zip(axes.of(start), axes.of(end), strict=True):
            identify(before, after)
    names = Names(widths, layers.sites, parameters)
    for key in axes.heads:
        for axis in resolved(key):
            names.practical[axis] = 256
    loss, logits = _ends(layers.sites)
    emitter = Emitter(axes, names, widths, _readouts(logits, layers.sites))
    for site in layers.sites:
        for each in site.inputs:
            emitter.readers.setdefault(each, []).append(site)
    for site in layers.sites:
        if not site.constant and site.kind != "output":
            emitter.values[site] = _emitted(emitter, site)
    if loss is None:
        for tensor in emitter.value(logits).values():
            emitter.apply(logits, "cross_entropy", (tensor,), "loss")
    used = {each for node in emitter.nodes for each in node.inputs}
    graph = Graph(
        name,
        tuple(emitter.nodes),
        MappingProxyType({role: each for role, each in emitter.parameters.items() if role in used}),
        MappingProxyType(emitter.shapes),
        tuple(emitter.named),
        MappingProxyType({}),
        tuple((_one(emitter, start), _one(emitter, end)) for start, end in layers.carries),
        title if title.isidentifier() else "",
    )
    return graph, names.warnings


def rule_of(site: Site) -> Rule:
    """The rule of a call: by its full name, without its overload, or by its ATen name in the engine's registry.

    Raises:
        DeriveError: when there is none.
    """
    names = (site.op, family(site.op))
    for name in names:
        if name in RULES:
            return RULES[name]
    for op in OPS.values():
        if not set(names).isdisjoint(op.aten) and len(site.inputs) == 1:
            return Rule(lambda axes, each: [axes.of(each.inputs[0])], generic(op.name))
    raise site.refuse(
        f"{site.op} has no rule",
        "register the function that calls it with widthwise.verify.trace.stand_in, or an engine op with this ATen name",
    )


def _axes(sites: Sequence[Site], widths: tuple[int, ...]) -> Axes:
    axes = Axes(len(widths))
    for site in sites:
        if site.kind == "output":
            continue
        if site.kind != "op" or site.constant:
            origin = site.names[0].removesuffix(".weight").rsplit(".", 1)[-1] if site.kind == "parameter" else ""
            axes.known[site] = [axes.fresh(shape, origin, site.kind == "parameter") for shape in site.shapes]
            continue
        rule = rule_of(site)
        try:
            axes.known[site] = rule.axes(axes, site)
        except DeriveError as error:
            raise error if error.where else site.refuse(error.what, error.cure) from None
    return axes


def _emitted(emitter: Emitter, site: Site) -> list[Value]:
    try:
        if site.kind == "parameter":
            return emitter.parameter(site)
        if site.kind == "input":
            (chosen,) = [chosen for _, chosen in emitter.keys(emitter.dims(site))]
            shape = emitter.shape(chosen)
            return [{frozenset(): emitter.apply(site, "input", (), site.name, shape=shape)}]
        return rule_of(site).emit(emitter, site)
    except DeriveError as error:
        raise error if error.where else site.refuse(error.what, error.cure) from None


def _ends(sites: Sequence[Site]) -> tuple[Site | None, Site]:
    """The loss, where the model computes it, and the logits."""
    losses = [site for site in sites if family(site.op) == "aten.cross_entropy_loss"]
    outputs = [each for each in tensors(sites[-1].args) if each.number and not each.constant]
    if losses:
        return losses[0], losses[0].inputs[0]
    if not outputs:
        raise DeriveError("the model has no floating-point output", cure="return logits, or a loss")
    return None, outputs[0]


def _readouts(logits: Site, sites: Sequence[Site]) -> dict[Site, str]:
    """The linear map that makes the logits: its multiplier is a rule of its own. A weight that is read elsewhere too
    (a tied table) has another role, so that the multiplier is called by its module."""
    site = logits
    while True:
        op = family(site.op)
        activations = [each for each in site.inputs if not each.constant and each.kind != "parameter"]
        gained = op != "aten.add" and any(each.kind == "parameter" for each in site.inputs)
        weight = _weight(site)
        if weight is not None:  # reached through views, sums with a bias and numbers alone
            readers = [each for each in sites if weight in each.inputs]
            tied = len(readers) > 1
            return {site: site.module.rsplit(".", 1)[-1] or "logits_scale" if tied else "own"}
        if (
            len(activations) == 1
            and not gained
            and (op.removeprefix("aten.") in VIEWS or op in ("aten.add", "aten.mul", "aten.div"))
        ):
            site = activations[0]
        else:
            return {}


def _weight(site: Site) -> Site | None:
    """The parameter of a linear map; None of any other call."""
    op = family(site.op)
    if op in ("aten.linear", "aten.addmm"):
        return site.args[1 if op == "aten.linear" else 2]  # type: ignore[no-any-return]
    if op == "aten.einsum":
        return next((each for each in site.args[1] if each.kind == "parameter"), None)
    found = matrix(site) if op in ("aten.matmul", "aten.mm") else None
    return None if found is None else found[0]


def _one(emitter: Emitter, site: Site) -> str:
    return emitter.whole(site, site, "a repeated layer")
