"""Nodes of a graph that are one call in PyTorch: norm and gain, linear map and bias, the scan with what feeds it,
softmax attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass

from widthwise.codegen.layout import module_of
from widthwise.derive.errors import DeriveError
from widthwise.derive.exponents import HALF, ZERO
from widthwise.derive.graph import Graph, Node, atoms, extent, shape_text

L2_EPS = 1e-6  # of the scan's own normalization
TOKENS = "<tokens>"  # what an embedding reads, which is no tensor of the graph


@dataclass(frozen=True)
class Call:
    """One call, named after the node that it ends with. ``takes`` are its arguments, weights of layers not among them;
    ``absorbed`` the nodes before the last one."""

    kind: str
    takes: tuple[str, ...]
    absorbed: tuple[str, ...] = ()
    normalize: bool = False
    log_of_decay: str = ""


@dataclass(frozen=True)
class Plan:
    """What fusing looks at: the graph, the container of each node, and the linear maps that have a multiplier."""

    graph: Graph
    where: Mapping[str, str]
    multiplied: Set[str]

    def only(self, tensor: str, reader: Node) -> bool:
        """Whether a node is all that reads a tensor, and lives where it is made."""
        return len(self.graph.consumers(tensor)) == 1 and self.where[tensor] == self.where[reader.output]


def calls(plan: Plan) -> Mapping[str, Call]:
    """Every call by the output of its last node, in order.

    Raises:
        DeriveError: for a scan or an attention that no kernel computes.
    """
    graph = plan.graph
    found: dict[str, Call] = {}
    for node in graph.ordered:
        made = next((call for match in _MATCHES for call in match(plan, node)), None)
        if made:
            found[node.output] = made
    taken = {name for call in found.values() for name in call.absorbed}
    for node in graph.ordered:
        if node.output not in found and node.output not in taken:
            found[node.output] = Call(node.op, (TOKENS,) if node.op == "embedding" else node.inputs)
    return {node.output: found[node.output] for node in graph.ordered if node.output not in taken}


def _norm(plan: Plan, node: Node) -> Iterator[Call]:
    """A norm and a gain in a layer of its own, along the norm's axis alone."""
    graph = plan.graph
    if node.op != "einsum" or (norm := graph.makers.get(node.inputs[0])) is None:
        return
    gain = node.inputs[1]
    layer = gain in graph.parameters and module_of(graph.parameters[gain])[-1:] == (gain,)
    fits = layer and norm.op in ("rms_norm", "layer_norm") and node.shape == norm.shape
    if fits and graph.shapes[gain] == (norm.attrs["axis"],) and plan.only(norm.output, node):
        yield Call("norm", norm.inputs, (norm.output,))


def _bias(plan: Plan, node: Node) -> Iterator[Call]:
    """A linear map and the bias of the same layer. A multiplier in between keeps them apart."""
    graph = plan.graph
    if node.op != "add" or len(node.inputs) != 2 or (linear := graph.makers.get(node.inputs[0])) is None:
        return
    shift = graph.parameters.get(node.inputs[1])
    if shift is None or linear.op != "linear" or linear.output in plan.multiplied:
        return
    if module_of(shift) == module_of(graph.parameters[linear.inputs[1]]) and plan.only(linear.output, node):
        yield Call("linear", linear.inputs[:1], (linear.output,))


def _scan(plan: Plan, node: Node) -> Iterator[Call]:
    """The gated delta rule: unit keys are its own option, and it takes the logarithm of the decay."""
    if node.op != "scan":
        return
    graph = plan.graph
    _check_scan(graph, node)
    q, k, v, *gates = node.inputs
    norms = [graph.makers.get(name) for name in (q, k)]
    normalize = all(
        norm and norm.op == "l2_norm" and norm.attrs["eps"] == L2_EPS and plan.only(norm.output, node) for norm in norms
    )
    absorbed: list[str] = []
    if normalize:
        q, k = (norm.inputs[0] for norm in norms if norm)
        absorbed += node.inputs[:2]
    log_of_decay = ""
    if node.attrs["decay"]:
        decay = graph.makers.get(gates[0])
        if decay and decay.op in ("exp", "sigmoid") and plan.only(decay.output, node):
            absorbed.append(decay.output)
            gates[0] = decay.inputs[0]
            log_of_decay = {"exp": "", "sigmoid": "F.logsigmoid"}[decay.op]
        else:
            log_of_decay = "torch.log"
    yield Call("scan", (q, k, v, *gates), tuple(absorbed), normalize, log_of_decay)


def _check_scan(graph: Graph, node: Node) -> None:
    q, _, v, *gates = (graph.shapes[name] for name in node.inputs)
    key_scale = extent(atoms(q[-1:])) * HALF if node.attrs.get("key_scale") else ZERO
    wrong = None
    if not node.attrs["erase"] or not node.attrs["strength"]:
        wrong = "it writes without erasing, and the kernel is the delta rule"
    elif node.attrs["power"] + key_scale != ZERO:
        wrong = "its output has a power of the width of its own"
    elif len(q) != 2 or len(v) != 2:
        wrong = f"q {shape_text(q)} and v {shape_text(v)} are not heads of one axis each"
    elif atoms(v[:1])[: len(atoms(q[:1]))] != atoms(q[:1]):
        wrong = f"each head of q {shape_text(q)} must serve consecutive heads of v {shape_text(v)}"
    elif any(gate != v[:1] for gate in gates):
        wrong = f"its gates must be one number a head, {shape_text(v[:1])}"
    if wrong:
        raise DeriveError(
            f"no kernel computes the scan {node.output!r}: {wrong}",
            where=node.where,
            cure="generate its parametrization, which needs no model of ours",
        )


def _attention(plan: Plan, node: Node) -> Iterator[Call]:
    """softmax(scale · q·k) v over all tokens up to the present one."""
    graph = plan.graph
    softmax = graph.makers.get(node.inputs[0]) if node.op == "einsum" else None
    if softmax is None or softmax.op != "softmax":
        return
    scale = graph.makers.get(softmax.inputs[0])
    scores = graph.makers.get(scale.inputs[0]) if scale and scale.op == "scale" else None
    if scale is None or scores is None or scores.op != "einsum":
        raise _no_attention(softmax, "its scores are no scaled product of queries and keys")
    (q, k), v = scores.inputs, node.inputs[1]
    heads, keys, values = graph.shapes[q], graph.shapes[k], graph.shapes[v]
    if not all(plan.only(a.output, b) for a, b in ((scores, scale), (scale, softmax), (softmax, node))):
        raise _no_attention(softmax, "its scores are read elsewhere")
    if {len(heads), len(keys), len(values)} != {2} or keys[:1] != values[:1] or heads[1:] != keys[1:]:
        raise _no_attention(softmax, "queries, keys and values must have heads and one more axis")
    if atoms(heads[:1])[: len(atoms(keys[:1]))] != atoms(keys[:1]) or node.shape != (heads[0], values[1]):
        raise _no_attention(softmax, "each head of keys must serve consecutive heads of queries")
    yield Call("attention", (q, k, v), (scores.output, scale.output, softmax.output))


def _no_attention(node: Node, why: str) -> DeriveError:
    return DeriveError(
        f"softmax {node.output!r} is no attention that can be emitted: {why}",
        where=node.where,
        cure="describe it with Builder.attention, one axis of heads in front",
    )


_MATCHES = (_norm, _bias, _scan, _attention)
