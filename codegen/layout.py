"""Where each node of a graph lives in a model's tree of modules: what classes and names of multipliers follow.

A container is a dotted pattern, ``model.layers.*.attn``; the root is the empty string. Parameters have their place by
name, and everything else follows from dataflow.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from widthwise.derive.graph import Graph, Node, Parameter

Path = tuple[str, ...]


def containers(graph: Graph) -> Mapping[str, str]:
    """The container of every node, by the name of its output.

    A node lives with the parameter it reads, when it is the first to read it; one that reads another's parameter, where
    both can be reached. Any other lives in what is common to the containers of its readers, and inside of a repeated
    block exactly when the block's output depends on it and it depends on the block. A container whose nodes are no
    contiguous piece of dataflow cannot be called as one module: its nodes live in its parent.
    """
    placed = _placed(graph)
    paths = {at[:end] for at in placed.values() for end in range(1, len(at) + 1)}
    for path in sorted(paths, key=lambda path: (-len(path), path)):
        inside = {name for name, at in placed.items() if at[: len(path)] == path}
        if path[-1] != "*" and not contiguous(graph, inside):
            placed |= {name: path[:-1] for name in inside if placed[name] == path}
    return {name: ".".join(path) for name, path in placed.items()}


def module_of(parameter: Parameter) -> Path:
    """The module that holds a parameter: its dotted name without the last part."""
    return tuple(parameter.patterns[0].split(".")[:-1])


def home(parameter: Parameter) -> Path:
    """The container of a parameter: that of the layer it belongs to (``q_proj.weight``), or of itself (``A_log``)."""
    parts = parameter.patterns[0].split(".")
    layer = (parts[-2] if len(parts) > 1 else "", parts[-1])
    if layer == (parameter.role, "weight") or (layer[1] == "bias" and parameter.role == f"{layer[0]}_bias"):
        return tuple(parts[:-2])
    return tuple(parts[:-1])


def common(paths: Iterable[Path]) -> Path:
    """The longest common beginning; of no path at all, the root."""
    shared: Path | None = None
    for path in paths:
        if shared is None:
            shared = path
        length = next((at for at, (a, b) in enumerate(zip(shared, path, strict=False)) if a != b), len(path))
        shared = shared[:length]
    return shared or ()


def blocks(graph: Graph) -> Mapping[Path, tuple[str, str, frozenset[str]]]:
    """Each repeated block by its container: its input, its output, and the nodes that it repeats."""
    found = {}
    for start, end in graph.carries:
        before = _ancestors(graph, start) | {start}
        inside = (_ancestors(graph, end) | {end}) - before
        path = common(home(graph.parameters[name]) for name in inside if name in graph.parameters)
        while path and path[-1] != "*":
            path = path[:-1]
        if not path:
            continue  # a block without parameters, or with tied ones alone, repeats nothing that has a name
        members = set()
        for node in graph.ordered:
            own = any(
                source == start or source in members or (source in inside and source in graph.parameters)
                for source in node.inputs
            )
            if node.output in inside and own:
                members.add(node.output)
        found[path] = (start, end, frozenset(members))
    return found


def _ancestors(graph: Graph, tensor: str) -> set[str]:
    seen: set[str] = set()
    waiting = [tensor]
    while waiting:
        maker = graph.makers.get(waiting.pop())
        for source in maker.inputs if maker else ():
            if source not in seen:
                seen.add(source)
                waiting.append(source)
    return seen


def _placed(graph: Graph) -> dict[str, Path]:
    owners: dict[str, Node] = {}
    for node in graph.ordered:
        for source in node.inputs:
            if source in graph.parameters:
                owners.setdefault(source, node)
    repeated = blocks(graph)
    ends = {end: path for path, (_, end, _) in repeated.items()}
    placed: dict[str, Path] = {}
    for node in reversed(graph.ordered):
        read = [source for source in node.inputs if source in graph.parameters]
        own = [home(graph.parameters[source]) for source in read if owners[source] is node]
        borrowed = [home(graph.parameters[source]) for source in read if owners[source] is not node]
        readers = [placed[reader.output] for reader, _ in graph.consumers(node.output)]
        path = common(own) if own else ends.get(node.output, common(readers))
        path = common([path, *borrowed])
        for block, (_, _, members) in repeated.items():
            if path[: len(block)] == block and node.output not in members:
                path = block[:-2]  # what only feeds the block comes before it
        placed[node.output] = path
    return placed


def contiguous(graph: Graph, inside: set[str]) -> bool:
    """Whether no path leaves these nodes and comes back."""
    left: set[str] = set()
    for node in graph.ordered:
        if node.output in inside:
            if not left.isdisjoint(node.inputs):
                return False
        elif any(source in inside or source in left for source in node.inputs):
            left.add(node.output)
    return True
