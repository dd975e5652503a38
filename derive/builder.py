"""Describe an architecture: ``g.linear(x, "attn.q_proj", out=H * K)`` and its kin, in the order one would write it.

Every call checks shapes at once and blames the caller's line. A name's last part is the parameter's role; the
whole dotted name, with the enclosing block's prefix, is the pattern its real parameters match.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sympy import Expr

from widthwise.derive.errors import DeriveError
from widthwise.derive.exponents import HALF, exponent
from widthwise.derive.graph import Dim, Graph, Group, Node, Parameter, Shape, as_group, atoms, extent, shape_text
from widthwise.derive.laws import NORMAL, ONES, TAPS, UNIT_NORMAL, ZEROS, Law
from widthwise.derive.ops import OPS
from widthwise.derive.ops.pointwise import NONLINEARITIES

_HERE = Path(__file__).resolve()


@dataclass(frozen=True)
class Tensor:
    """A handle on a tensor of the graph being built."""

    name: str
    shape: Shape


def _caller() -> str:
    """file:line of the nearest frame outside this file."""
    frame = sys._getframe(1)
    while frame.f_back is not None and (Path(frame.f_code.co_filename).resolve() == _HERE):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def _axis(axis: Dim | Group) -> Group:
    if not isinstance(axis, Dim | Group):
        raise DeriveError(
            f"{axis!r} is no axis", where=_caller(), cure='make one, g.dim("d_model", 1), or H * K of two'
        )
    return as_group(axis)


def _tensor(given: Tensor) -> Tensor:
    if not isinstance(given, Tensor):
        raise DeriveError(f"{given!r} is no tensor", where=_caller(), cure="use tensors that this builder returned")
    return given


class Builder:
    """Collects nodes and parameters; :meth:`build` returns the finished :class:`Graph`."""

    def __init__(self, name: str, *, title: str = "", **options: object) -> None:
        self._name, self._title = name, title
        self._options = {
            key: ("on" if value else "off") if isinstance(value, bool) else str(value) for key, value in options.items()
        }
        self._nodes: list[Node] = []
        self._parameters: dict[str, Parameter] = {}
        self._shapes: dict[str, Shape] = {}
        self._named: list[str] = []
        self._dims: dict[str, Dim] = {}
        self._carriers: set[str] = set()
        self._carries: list[tuple[str, str]] = []
        self._prefix = ""

    # -- declarations -------------------------------------------------------------------------------------------

    def dim(self, name: str, exponent_: int | str | Expr = 0, practical: int = 4096) -> Dim:
        """An axis of Θ(n^exponent) entries; ``practical`` is its largest size at the widths people train."""
        made = Dim(name, exponent(exponent_), practical)
        if self._dims.setdefault(name, made) != made:
            raise DeriveError(f"axis {name!r} is declared twice, differently", where=_caller(), cure="rename one")
        return made

    def input(self, name: str, *axes: Dim | Group) -> Tensor:
        """Data of Θ(1) entries."""
        shape = tuple(map(_axis, axes))
        return self._apply("input", (), name=name, shape=shape)

    def parameter(self, name: str, *axes: Dim | Group, law: Law = ZEROS, trainable: bool = True) -> Tensor:
        """A trainable tensor used entrywise: a gain, a bias, a decay rate."""
        return self._parameter(name, tuple(map(_axis, axes)), law, trainable, suffix="")

    def repeat(self, prefix: str, count: int, layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """``count`` layers of one kind, described and solved once.

        Sound where a layer's output looks to the next one as its input did: both must have the same size (or deriving
        fails), and the same size of gradient (or a finding says by how much it drifts).
        """
        if count < 1:
            raise DeriveError(f"a block repeated {count} times", where=_caller(), cure="repeat it at least once")
        outer, self._prefix = self._prefix, f"{self._prefix}{prefix}.*."
        y = layer(_tensor(x))
        self._prefix = outer
        if _tensor(y).shape != x.shape:
            raise DeriveError(
                f"a layer turns {shape_text(x.shape)} into {shape_text(y.shape)} and cannot repeat",
                where=_caller(),
                cure="end it with the shape it starts from",
            )
        self._carries.append((x.name, y.name))
        return y

    # -- ops ----------------------------------------------------------------------------------------------------

    def embedding(
        self, name: str, vocabulary: Dim, out: Dim | Group, *, trainable: bool = True, output: str | None = None
    ) -> Tensor:
        """A row of the table [vocabulary, out] per token."""
        table = self._parameter(name, (_axis(vocabulary), _axis(out)), UNIT_NORMAL, trainable)
        return self._apply("embedding", (table,), name=output)

    def linear(
        self,
        x: Tensor,
        name: str,
        out: Dim | Group,
        *,
        bias: bool = False,
        tied_to: str | None = None,
        trainable: bool = True,
        output: str | None = None,
    ) -> Tensor:
        """y = W x over the last axis of x; W is [out, in]. With ``tied_to``, W is that role's weight."""
        if tied_to:
            weight = self.tied_table(tied_to)
        else:
            weight = self._parameter(name, (_axis(out), self._last(x)), trainable=trainable)
        y = self._apply("linear", (x, weight), name=None if bias else output)
        if y.shape[-1] != _axis(out):
            raise DeriveError(
                f"{tied_to!r} makes {shape_text(y.shape)}, not {_axis(out)}", where=_caller(), cure="tie to another"
            )
        if bias:
            shift = self._parameter(
                f"{name}_bias", y.shape[-1:], ZEROS, trainable=trainable, suffix="", pattern=f"{name}.bias"
            )
            y = self._apply("add", (y, shift), name=output)
        return y

    def _last(self, x: Tensor) -> Group:
        if not _tensor(x).shape:
            raise DeriveError(
                f"{x.name!r} is one number per token and has no last axis", where=_caller(), cure="give it an axis"
            )
        return x.shape[-1]

    def tied_table(self, name: str) -> Tensor:
        """A parameter declared before, to use it once more."""
        role = name.rsplit(".", 1)[-1]
        if role not in self._parameters:
            raise DeriveError(f"no parameter {role!r} to tie to", where=_caller(), cure="declare it first")
        return Tensor(role, self._parameters[role].shape)

    def readout(
        self, x: Tensor, name: str, vocabulary: Dim, *, tied_to: str | None = None, output: str | None = "logits"
    ) -> Tensor:
        """Logits = multiplier · W x. The multiplier is a rule of its own, of role ``name``; W may be a tied table.

        At the base width logits are Θ(1): W is drawn so, or, where it is a table of unit entries, the multiplier's base
        value is fan_in^(-1/2) (``base="fan_in"``).
        """
        role = name.rsplit(".", 1)[-1]
        if tied_to:
            return self._apply("linear", (x, self.tied_table(tied_to)), name=output, carrier=role, base="fan_in")
        weight = self._parameter(name, (_axis(vocabulary), self._last(x)))
        return self._apply("linear", (x, weight), name=output, carrier=role)

    def conv1d(self, x: Tensor, name: str, taps: Dim, *, output: str | None = None) -> Tensor:
        """Depthwise causal convolution of a few taps; base taps U(±1/√taps), PyTorch's default, whose sum over
        taps has rms 1/√3."""
        weight = self._parameter(name, (*_tensor(x).shape, _axis(taps)), TAPS)
        return self._apply("conv1d", (x, weight), name=output, gain=3.0**-0.5)

    def add(self, *tensors: Tensor, output: str | None = None) -> Tensor:
        """A plain sum."""
        return self._apply("add", tensors, name=output)

    def residual(self, x: Tensor, branch: Tensor, *, output: str | None = None) -> Tensor:
        """A sum into a residual stream, which keeps a scale of Θ(1)."""
        return self._apply("residual", (x, branch), name=output)

    def scale(
        self,
        x: Tensor,
        power: int | str | Expr = 0,
        *,
        factor: float = 1.0,
        multiplier: str | None = None,
        base: Dim | Group | None = None,
        output: str | None = None,
    ) -> Tensor:
        """x · factor · n^power, times a multiplier of role ``multiplier`` that the engine solves for, where given.
        ``factor`` is width-free, so that it matters to who runs the graph and to no exponent; so is the multiplier's
        base value, which is 1, or the size of axis ``base`` to the power -1/2."""
        usual = {} if base is None else {"base": str(base)}
        return self._apply(
            "scale", (x,), name=output, power=exponent(power), carrier=multiplier, factor=factor, **usual
        )

    def reshape(self, x: Tensor, *axes: Dim | Group, output: str | None = None) -> Tensor:
        """The same axes, regrouped: ``g.reshape(q, H, K)``."""
        return self._apply("reshape", (x,), name=output, shape=tuple(map(_axis, axes)))

    def product(self, a: Tensor, b: Tensor, *axes: Dim | Group, output: str | None = None) -> Tensor:
        """A product summed over every axis that ``axes`` (by default those of ``a``) leaves out."""
        shape = tuple(map(_axis, axes)) if axes else _tensor(a).shape
        return self._apply("einsum", (a, b), name=output, shape=shape)

    def contract(self, a: Tensor, b: Tensor, *axes: Dim | Group, output: str | None = None) -> Tensor:
        """A product of which exactly ``axes`` remain; none of them means a scalar."""
        return self._apply("einsum", (a, b), name=output, shape=tuple(map(_axis, axes)))

    def pointwise(self, function: str, x: Tensor, *, output: str | None = None) -> Tensor:
        """silu, gelu, relu, sigmoid, softplus, exp, tanh."""
        if function not in NONLINEARITIES or function == "softmax":
            known = ", ".join(sorted(set(NONLINEARITIES) - {"softmax"}))
            raise DeriveError(f"there is no nonlinearity {function!r}", where=_caller(), cure=f"known: {known}")
        return self._apply(function, (x,), name=output)

    def norm(
        self,
        x: Tensor,
        gain: str | Tensor | None = None,
        *,
        kind: str = "rms_norm",
        eps: float = 1e-5,
        output: str | None = None,
    ) -> Tensor:
        """Normalize the last axis (``rms_norm``, ``layer_norm``, ``l2_norm``), with a gain where one is named, or one
        declared before is passed; a named gain spans the last axis alone and is shared along the others."""
        if kind not in ("rms_norm", "layer_norm", "l2_norm"):
            raise DeriveError(
                f"there is no norm {kind!r}", where=_caller(), cure="known: rms_norm, layer_norm, l2_norm"
            )
        y = self._apply(kind, (x,), name=output if gain is None else None, axis=self._last(x), eps=eps)
        if gain is None:
            return y
        if isinstance(gain, str):
            gain = self._parameter(gain, x.shape[-1:], ONES)
        return self._apply("einsum", (y, gain), name=output, shape=x.shape)

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        multiplier: str | None = "attn_scale",
        power: int | str | Expr = 0,
        scores: str | None = None,
        output: str | None = None,
    ) -> Tensor:
        """Softmax attention of q […, K] with k, v: softmax(n^power · multiplier · q·k) v, the time axis implicit. The
        multiplier is K^(-1/2) at the base width."""
        self._last(v)
        heads = _tensor(q).shape[:-1]
        base = q.shape[-1] if multiplier else None
        logits = self.scale(self.contract(q, k, *heads), power, multiplier=multiplier, base=base, output=scores)
        probabilities = self._apply("softmax", (logits,), name=None)
        return self.contract(probabilities, v, *heads, v.shape[-1], output=output)

    def scan(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        decay: Tensor | None = None,
        strength: Tensor | None = None,
        erase: bool = True,
        power: int | str | Expr = 0,
        key_scale: bool = False,
        state: str | None = None,
        output: str | None = None,
    ) -> Tensor:
        """The gated delta rule and its kin (see ops/scan.py): o = n^power · S q, S decayed and written over time;
        with ``erase``, a write first takes out what the state holds for its key (which moves no exponent). With
        ``key_scale``, o is also divided by the square root of the key axis, as FLA and Qwen3-Next have it. ``state``
        names the state for tables."""
        gates = tuple(gate for gate in (decay, strength) if gate is not None)
        if state is not None:
            self._named.append(state)
            self._shapes[state] = (*v.shape, self._last(k))
        return self._apply(
            "scan",
            (q, k, v, *gates),
            name=output,
            power=exponent(power) - (extent(atoms(_tensor(k).shape[-1:])) * HALF if key_scale else 0),
            key_scale=key_scale,
            decay=decay is not None,
            strength=strength is not None,
            erase=erase,
            state=state,
        )

    def cross_entropy(self, logits: Tensor) -> Tensor:
        """The loss: mean cross-entropy over tokens."""
        return self._apply("cross_entropy", (logits,), name="loss")

    def op(self, name: str, *inputs: Tensor, output: str | None = None, **attrs: Any) -> Tensor:
        """Any op of the registry, by name: what a user's own op is applied with."""
        return self._apply(name, inputs, name=output, **attrs)

    def build(self) -> Graph:
        """The finished graph, checked for cycles and missing tensors.

        Raises:
            DeriveError: when it has no loss, or is not well formed.
        """
        graph = Graph(
            self._name,
            tuple(self._nodes),
            MappingProxyType(dict(self._parameters)),
            MappingProxyType(dict(self._shapes)),
            tuple(self._named),
            MappingProxyType(self._options),
            tuple(self._carries),
            self._title,
        )
        if not any(node.op == "cross_entropy" for node in graph.ordered):
            raise DeriveError(f"architecture {self._name!r} has no loss", cure="end it with Builder.cross_entropy")
        return graph

    # -- inside -------------------------------------------------------------------------------------------------

    def _parameter(
        self,
        name: str,
        shape: Shape,
        law: Law = NORMAL,
        trainable: bool = True,
        *,
        suffix: str = ".weight",
        pattern: str | None = None,
    ) -> Tensor:
        role = name.rsplit(".", 1)[-1]
        if role in self._shapes:
            raise DeriveError(
                f"the name {role!r} is taken",
                where=_caller(),
                cure="give each parameter and tensor its own name; reuse a weight with tied_to=, a gain by passing it",
            )
        if not isinstance(law, Law):
            raise DeriveError(
                f"{law!r} is no law", where=_caller(), cure="take one of derive.laws: NORMAL, ONES, ZEROS"
            )
        if not role.isidentifier() or not all(part.isidentifier() for part in name.split(".")):
            raise DeriveError(f"{name!r} is not a dotted name", where=_caller(), cure="use letters, digits and _")
        full = f"{self._prefix}{pattern or name + suffix}"
        self._parameters[role] = Parameter(role, shape, (full,), law, trainable, _caller())
        self._shapes[role] = shape
        return Tensor(role, shape)

    def _describe(self, op: str, inputs: tuple[Tensor, ...]) -> str:
        """A name for a tensor the author did not name, which proofs can be read by: ``silu(z_gate)``."""
        sources = [tensor.name for tensor in inputs]
        text = "·".join(sources) if op == "einsum" else f"{op}({', '.join(sources)})"
        return text if len(text) <= 40 and text not in self._shapes else f"{op}_{len(self._nodes)}"

    def _apply(self, op: str, inputs: tuple[Tensor, ...], *, name: str | None, **attrs: Any) -> Tensor:
        where = _caller()
        inputs = tuple(map(_tensor, inputs))
        output = name or self._describe(op, inputs)
        if output in self._shapes:
            raise DeriveError(f"the name {output!r} is taken", where=where, cure="give each tensor its own name")
        if op not in OPS:
            raise DeriveError(f"there is no op {op!r}", where=where, cure=f"known: {', '.join(sorted(OPS))}")
        for tensor in inputs:
            if self._shapes.get(tensor.name) != tensor.shape:
                raise DeriveError(
                    f"tensor {tensor.name!r} is not part of this description",
                    where=where,
                    cure="use tensors that this builder returned",
                )
        carrier = attrs.get("carrier")
        if carrier in self._carriers:
            raise DeriveError(
                f"the multiplier {carrier!r} is carried twice", where=where, cure="name each multiplier by itself"
            )
        try:
            shape = OPS[op].shape([tensor.shape for tensor in inputs], attrs)
        except DeriveError as error:
            raise DeriveError(error.what, where=f"{op} at {where}", cure=error.cure) from None
        except (ValueError, IndexError, KeyError, TypeError):
            given = ", ".join(shape_text(tensor.shape) for tensor in inputs) or "no tensor"
            raise DeriveError(
                f"{op} cannot take {given}" + (f" with {', '.join(attrs)}" if attrs else ""),
                where=f"{op} at {where}",
                cure="use the builder's method for it, which gives each op what it needs",
            ) from None
        if carrier:
            self._carriers.add(carrier)
        self._nodes.append(
            Node(op, tuple(tensor.name for tensor in inputs), output, shape, MappingProxyType(dict(attrs)), where)
        )
        self._shapes[output] = shape
        if name:
            self._named.append(name)
        return Tensor(output, shape)
