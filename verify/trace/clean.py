"""Sites without what changes no value's size: casts, copies, dead code; in-place calls told from aliasing."""

from __future__ import annotations

from collections.abc import Sequence

from widthwise.verify.trace.sites import Site, replaced

SAME = {
    "aten.to",
    "aten._to_copy",
    "aten.type_as",
    "aten.contiguous",
    "aten.clone",
    "aten.alias",
    "aten.detach",
    "aten.lift_fresh_copy",
    "aten.dropout",
    "aten.dropout_",
    "aten.feature_dropout",
    "aten.float",
    "aten.view_as",
    "widthwise_trace.rotate",
}
"""What passes its first input on, entry by entry: casts, copies; dropout, a width-free factor; a rotation, which keeps
lengths and inner products."""
MOVES = {"aten.view", "aten.reshape", "aten.slice", "aten.select", "aten.transpose", "aten.permute", "getitem"}


def family(op: str) -> str:
    """``aten.mul.Tensor`` → ``aten.mul``."""
    return ".".join(op.split(".")[:2])


def cleaned(sites: Sequence[Site]) -> list[Site]:
    """The calls that the output depends on, each reading what really made its input.

    Raises:
        DeriveError: for a write into memory that something else still reads.
    """
    _check_writes(sites)
    stands: dict[Site, Site] = {}

    def source(site: Site) -> Site:
        return stands.get(site, site)

    for site in sites:
        site.args, site.kwargs = replaced(site.args, source), replaced(site.kwargs, source)
        if family(site.op) in SAME:
            (stands[site], *_) = site.inputs
        elif family(site.op).endswith("_") and site.kind == "op":
            name, *overload = site.op.removeprefix("aten.").split(".")
            site.op = ".".join(["aten", name.rstrip("_"), *overload])
    return living([site for site in sites if site not in stands])


def living(sites: Sequence[Site]) -> list[Site]:
    """Those that the output depends on, in their order."""
    wanted: set[Site] = set()
    for site in reversed(sites):
        if site.kind == "output" or site in wanted:
            wanted.update(site.inputs)
            wanted.add(site)
    return [site for site in sites if site in wanted]


def _check_writes(sites: Sequence[Site]) -> None:
    """An in-place call is as good as any other where nobody else looks at the memory afterwards."""
    order = {site: at for at, site in enumerate(sites)}
    readers: dict[Site, list[Site]] = {}
    for site in sites:
        for each in site.inputs:
            readers.setdefault(each, []).append(site)
    for site in sites:
        name = site.op.split(".")[1] if site.kind == "op" and "." in site.op else ""
        if not name.endswith("_") or name.startswith("_") or not site.inputs or site.constant:
            continue
        base = site.inputs[0]
        while base.kind == "op" and family(base.op) in MOVES and base.inputs:
            base = base.inputs[0]
        if base.kind == "parameter":
            raise site.refuse(f"{base.names[0]} is written in the forward pass", "keep parameters as they are there")
        shared, waiting = {base}, [base]
        while waiting:
            for each in readers.get(waiting.pop(), ()):
                if each not in shared and family(each.op) in MOVES and order[each] < order[site]:
                    shared.add(each)
                    waiting.append(each)
        late = [each for one in shared for each in readers.get(one, ()) if order[each] > order[site]]
        siblings = [each for each in late if not (base.kind == "op" and base.op.startswith("aten.topk"))]
        if siblings:
            raise site.refuse(
                f"{site.op} writes into memory that {siblings[0].op} reads later under another name",
                "write y = x * a rather than x *= a there",
            )
