"""The gated delta rule as one op: S_t = α_t S_{t−1} (I − β_t k_t k_tᵀ) + β_t v_t k_tᵀ,  o_t = n^power · S_t q_t.

Why one step of the recurrence tells the size of all: α ≤ 1, and with unit keys I − β k kᵀ is a contraction, so the
state is as large as a width-free sum of β v kᵀ, and so are the corrections. (A test holds this rule against the
same recurrence unrolled from primitive ops.) Inputs: q, k ``[…, K]``; v ``[…, V]``; then, where the variant has
them, the decay α and the writing strength β. Axes that q and k lack (value groups, shared heads) are summed
backward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from widthwise.derive.errors import DeriveError
from widthwise.derive.exponents import HALF, ZERO, at_most, largest, n_to
from widthwise.derive.facts import Fact
from widthwise.derive.graph import Dim, Node, Shape, atoms, extent, shape_text
from widthwise.derive.ops.einsum import product_change, summed
from widthwise.derive.ops.registry import Op, Piece, always, register
from widthwise.derive.signal import Signal, contract

if TYPE_CHECKING:
    from widthwise.derive.backward import Backward
    from widthwise.derive.forward import Forward, State


def _shape(shapes: Sequence[Shape], attrs: Mapping[str, Any]) -> Shape:
    q, k, v, *gates = shapes
    if atoms(q) != atoms(k):
        raise DeriveError(f"q {shape_text(q)} and k {shape_text(k)} of a scan differ", cure="give both the same axes")
    heads = set(atoms(v))
    if missing := [dim.name for dim in atoms(q)[:-1] if dim not in heads]:
        raise DeriveError(
            f"v {shape_text(v)} lacks the head axes {', '.join(missing)} of q {shape_text(q)}",
            cure="v has the heads of q and may have more",
        )
    for gate in gates:
        if not set(atoms(gate)) <= heads | set(atoms(q)):
            raise DeriveError(
                f"a gate of shape {shape_text(gate)} does not fit a state of {shape_text(v)} × {shape_text(q)}",
                cure="a gate may have the state's axes alone",
            )
    return v


def _gates(walk: Forward | Backward, node: Node) -> tuple[State | None, State | None]:
    """(decay, strength), where the variant has them."""
    rest = list(walk.inputs(node)[3:])
    decay = rest.pop(0) if node.attrs["decay"] else None
    return decay, rest.pop(0) if node.attrs["strength"] else None


def key_axis(walk: Forward | Backward, node: Node) -> tuple[Dim, ...]:
    """The axis that q·k sums."""
    return atoms(walk.graph.shapes[node.inputs[0]])[-1:]


def _state(walk: Forward, node: Node) -> State:
    """What is written: β v kᵀ, a width-free number of times."""
    from widthwise.derive.forward import State

    _, k, v = walk.inputs(node)[:3]
    strength = _gates(walk, node)[1]
    size = contract(v.init, k.init, (), "symmetry").signal
    if strength is not None:
        size = size.shifted(strength.init.size)
    because = f"a width-free sum over time of {node.inputs[2]} ⊗ {node.inputs[1]}"
    return State(size, Fact(node.attrs["state"], size.size, because, (v.fact, k.fact)))


def _check_keys(walk: Forward, node: Node, k: State, strength: State | None) -> None:
    """Erasing along a key is a contraction only while β‖k‖² stays Θ(1)."""
    if strength is None or not node.attrs["erase"]:
        return
    length = k.init.size + extent(key_axis(walk, node)) * HALF
    if not at_most(strength.init.size + 2 * length, ZERO):
        raise DeriveError(
            f"the scan erases along keys {node.inputs[1]!r} of length {n_to(length)}: its state diverges",
            where=node.where,
            cure="normalize the keys (g.norm(k, kind='l2_norm')), or write without erasing (erase=False)",
        )


def _forward(walk: Forward, node: Node) -> State:
    from widthwise.derive.forward import Change, State

    q, k, v = walk.inputs(node)[:3]
    _, strength = _gates(walk, node)
    _check_keys(walk, node, k, strength)
    over = key_axis(walk, node)
    scores, because = walk.contract(node, q.init, k.init, over)
    out = contract(scores, v.init, (), "symmetry").signal.shifted(node.attrs["power"])
    if strength is not None:
        out = out.shifted(strength.init.size)
    names = node.inputs
    if node.attrs.get("state"):
        walk.states[node.attrs["state"]] = _state(walk, node)
    fact = walk.fact(
        node,
        out,
        f"a width-free sum over time of ({names[0]}·{names[1]}) {names[2]}; {names[0]}·{names[1]}: {because}",
        f"activation · activation at init: {walk.assume.activations}",
    )
    score = product_change(walk, q, k, over)
    sizes = [] if score is None else [score + v.trained]
    if v.change is not None:
        sizes.append(v.change + scores.size)
    gates = [gate for gate in _gates(walk, node) if gate is not None and gate.change is not None]
    sizes += [gate.change + scores.size + v.init.size for gate in gates if gate.change is not None]
    if not sizes:
        return State(out, fact)
    change = largest(sizes) + node.attrs["power"]
    branch = walk.assume.activations_trained
    return State(
        out,
        fact,
        (
            Change(
                change,
                False,
                Fact(
                    f"change of {node.output}",
                    change,
                    f"Δ{names[0]}·{names[1]} once training aligns them",
                    (q.fact, k.fact, v.fact),
                    frozenset((f"Δactivation · activation: {branch}",)),
                ),
            ),
        ),
    )


def _backward(walk: Backward, node: Node, gradient: Signal) -> list[Piece]:
    q, k, v = (walk.trained(source) for source in node.inputs[:3])
    decay, strength = _gates(walk, node)
    shape_of = walk.graph.shapes
    names = node.inputs
    keys = key_axis(walk, node)
    gradient = gradient.shifted(node.attrs["power"])
    written = gradient.shifted(strength.init.size) if strength is not None else gradient
    scores, by_keys = walk.product(q, k, keys)
    # ∂L/∂S is ∂L/∂o ⊗ q, so every inner product with the state meets ∂L/∂o with v first
    if node.attrs.get("state"):
        walk.gradients[node.attrs["state"]] = contract(gradient, q, (), "symmetry").signal
    lost = summed(node.shape, (), shape_of[names[0]])
    read, by_values = walk.contract(written, v, lost)
    assumed = frozenset((f"forward · backward: {walk.assume.forward_backward}",))
    pieces = [
        Piece(
            0,
            contract(read, k, (), "symmetry").signal,
            f"Sᵀ ∂L/∂o: ∂L/∂o · v {by_values}",
            assumed,
            (names[1], names[2]),
        ),
        Piece(
            1,
            contract(read, q, (), "symmetry").signal,
            f"(∂L/∂S)ᵀ v: ∂L/∂o · v {by_values}",
            assumed,
            (names[0], names[2]),
        ),
        Piece(
            2,
            contract(written, scores, (), "symmetry").signal,
            f"∂L/∂S k: q·k {by_keys}",
            frozenset(),
            (names[0], names[1]),
        ),
    ]
    slot = 3
    for gate in (decay, strength):
        if gate is None:
            continue
        shape = shape_of[names[slot]]
        over_values = summed(node.shape, (), shape)
        met, how = walk.contract(gradient if gate is strength else written, v, over_values)
        total, how_keys = (
            (contract(met, scores, (), "symmetry").signal, by_keys)
            if keys[0] not in atoms(shape)
            else (contract(contract(met, q, (), "symmetry").signal, k, (), "symmetry").signal, "kept apart")
        )
        pieces.append(
            Piece(slot, total, f"⟨∂L/∂S, S⟩ over the state: ∂L/∂o · v {how}; q·k {how_keys}", assumed, names[:3])
        )
        slot += 1
    return pieces


register(
    Op(
        "scan",
        _shape,
        _forward,
        _backward,
        always("absolute"),
        aten=("widthwise.gated_delta_rule", "fla.chunk_gated_delta_rule"),
        entrywise=(2,),  # the channels of v; those of q and k are summed
    )
)
