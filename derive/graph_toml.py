"""A graph as canonical TOML, and back with suspicion: what a traced model is handed on as.

A file is parsed, never evaluated: TOML, then a fixed schema, then the exponent grammar, then every op's own check of
its shapes. Equal graphs give equal bytes, and reading what was written and writing it again gives the same bytes.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import tomli_w
from sympy import Expr

from widthwise.derive.errors import DeriveError
from widthwise.derive.exponents import parse, show
from widthwise.derive.graph import Dim, Graph, Group, Node, Parameter, Rows, Shape, atoms, shape_text
from widthwise.derive.laws import SYMMETRIC, Law
from widthwise.derive.ops import OPS
from widthwise.derive.toml_io import Reader

LIMIT = 4_000_000  # characters; a model of a few hundred nodes that do not repeat is a tenth of that
# What nodes may be given, and what some ops cannot do without. A user's own op may have others, of plain values.
ATTRIBUTES: Mapping[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("power",), Expr),
    **dict.fromkeys(("axis",), Group),
    **dict.fromkeys(("shape",), tuple),
    **dict.fromkeys(("eps", "factor", "gain"), float),
    **dict.fromkeys(("carrier", "base", "state"), str),
    **dict.fromkeys(("experts", "decay", "strength", "erase", "key_scale"), bool),
}
REQUIRED: Mapping[str, tuple[str, ...]] = {
    "scale": ("power",),
    "scan": ("power", "decay", "strength", "erase"),
    "conv1d": ("gain",),
    **dict.fromkeys(("rms_norm", "layer_norm", "l2_norm"), ("axis", "eps")),
    "batch_norm": ("eps",),
    **dict.fromkeys(("reshape", "einsum", "input", "broadcast"), ("shape",)),
}
_HEADER = "# A traced graph. An axis of exponent p has Θ(n^p) entries; batch and time are left out.\n"
_KIND = "widthwise graph 1"


def write_graph(graph: Graph, comments: tuple[str, ...] = ()) -> str:
    """Canonical text. ``comments`` are lines that say where it comes from.

    Raises:
        DeriveError: for an attribute of a node that no file can hold.
    """
    dims = {dim.name: dim for shape in graph.shapes.values() for dim in atoms(shape)}
    content: dict[str, Any] = {
        "kind": _KIND,
        "name": graph.name,
        "title": graph.title,
        "named": list(graph.named),
        "carries": [list(each) for each in graph.carries],
        "options": dict(sorted(graph.options.items())),
        "dims": [
            {"name": dim.name, "exponent": show(dim.exponent), "practical": dim.practical}
            for _, dim in sorted(dims.items())
        ],
        "parameters": [_parameter(each) for each in graph.parameters.values()],
        "nodes": [_node(each) for each in graph.nodes],
        "states": {
            name: _shape(shape)
            for name, shape in sorted(graph.shapes.items())
            if name not in graph.makers and name not in graph.parameters
        },
    }
    lines = "".join(f"# {each}\n" for each in comments)
    return _HEADER + lines + tomli_w.dumps(content, multiline_strings=False)


def _shape(shape: Shape) -> list[list[str]]:
    return [[dim.name for dim in group.dims] for group in shape]


def _parameter(parameter: Parameter) -> dict[str, Any]:
    law = parameter.law
    entry: dict[str, Any] = {
        "role": parameter.role,
        "shape": _shape(parameter.shape),
        "patterns": list(parameter.patterns),
        "law": law.name,
    }
    if law.high > law.low:
        entry |= {"low": law.low, "high": law.high}
    if not parameter.trainable:
        entry["trainable"] = False
    if parameter.where:
        entry["where"] = parameter.where
    if parameter.input_first:
        entry["input_first"] = True
    if parameter.rows is not None:
        rows = parameter.rows
        entry["rows"] = {
            "index": rows.index,
            "sizes": list(rows.sizes),
            "exponents": [show(each) for each in rows.exponents],
            "width": rows.width,
            "axis": rows.axis,
        }
    return entry


def _node(node: Node) -> dict[str, Any]:
    entry: dict[str, Any] = {"op": node.op, "inputs": list(node.inputs), "output": node.output}
    entry["shape"] = _shape(node.shape)
    attrs = {key: _attribute(node, key, value) for key, value in sorted(node.attrs.items()) if value is not None}
    if attrs:
        entry["attrs"] = attrs
    if node.where:
        entry["where"] = node.where
    return entry


def _attribute(node: Node, key: str, value: Any) -> Any:
    if isinstance(value, Expr):
        return {"exponent": show(value)}
    if isinstance(value, Group):
        return {"group": [dim.name for dim in value.dims]}
    if isinstance(value, tuple) and all(isinstance(each, Group) for each in value):
        return {"shape": _shape(value)}
    if isinstance(value, bool | int | float | str):
        return value
    raise DeriveError(f"attribute {key} = {value!r} cannot be written", where=node.where, cure="use plain values")


def read_graph(text: str, name: str = "the file") -> Graph:
    """The graph that :func:`write_graph` wrote.

    Raises:
        DeriveError: when it is not such a file, or its graph is not well formed.
    """
    if len(text) > LIMIT:
        raise DeriveError(f"{name} is larger than any graph", cure="check that it is the right file")
    try:
        content = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise DeriveError(f"{name} is not TOML: {error}", cure="write it again with widthwise trace") from None
    return _GraphReader(name, "write it again with widthwise trace").graph(content)


class _GraphReader(Reader):
    """Typed access to an untrusted graph."""

    def graph(self, content: Mapping[str, Any]) -> Graph:
        if content.get("kind") != _KIND:
            raise self.refuse(f"kind is {content.get('kind')!r}, not {_KIND!r}")
        self.only(
            content,
            {"kind", "name", "title", "named", "carries", "options", "dims", "parameters", "nodes", "states"},
        )
        dims: dict[str, Dim] = {}
        for entry in self.entries(content, "dims"):
            self.only(entry, {"name", "exponent", "practical"})
            dim = Dim(self.text(entry, "name"), self.required(entry, "exponent"), self.integer(entry, "practical"))
            if dims.setdefault(dim.name, dim) is not dim:
                raise self.refuse(f"axis {dim.name!r} is declared twice")
        self.dims = dims
        parameters: dict[str, Parameter] = {}
        for entry in self.entries(content, "parameters"):
            parameter = self.parameter(entry)
            if parameters.setdefault(parameter.role, parameter) is not parameter:
                raise self.refuse(f"parameter {parameter.role!r} is declared twice")
        shapes: dict[str, Shape] = {role: each.shape for role, each in parameters.items()}
        nodes = tuple(self.node(entry, shapes) for entry in self.entries(content, "nodes"))
        states = content.get("states")
        if not isinstance(states, dict):
            raise self.refuse("states is missing or not a table")
        for state in states:
            if shapes.setdefault(state, made := self.shape(states, state)) is not made:
                raise self.refuse(f"state {state!r} is a tensor too")
        named = self.texts(content, "named")
        carries = tuple(self.pair(each) for each in self.items(content, "carries"))
        for each in (*named, *(end for pair in carries for end in pair)):
            if each not in shapes:
                raise self.refuse(f"there is no tensor {each!r}")
        graph = Graph(
            self.text(content, "name"),
            nodes,
            MappingProxyType(parameters),
            MappingProxyType(shapes),
            named,
            MappingProxyType(self.texts_by_name(content, "options")),
            carries,
            self.text(content, "title"),
        )
        if not any(node.op == "cross_entropy" for node in graph.ordered):
            raise self.refuse("the graph has no loss")
        return graph

    def parameter(self, entry: dict[str, Any]) -> Parameter:
        self.only(
            entry, {"role", "shape", "patterns", "law", "low", "high", "trainable", "where", "input_first", "rows"}
        )
        law = self.text(entry, "law")
        if law not in SYMMETRIC:
            raise self.refuse(f"there is no law {law!r}")
        low, high = (self.number(entry, key) if key in entry else 0.0 for key in ("low", "high"))
        rows = None
        if "rows" in entry:
            rows = self.rows(entry["rows"])
        return Parameter(
            self.text(entry, "role"),
            self.shape(entry, "shape"),
            self.texts(entry, "patterns"),
            Law(law, SYMMETRIC[law], low, high),
            self.switch(entry, "trainable", True),
            self.text(entry, "where") if "where" in entry else "",
            rows,
            self.switch(entry, "input_first", False),
        )

    def rows(self, entry: Any) -> Rows:
        if not isinstance(entry, dict):
            raise self.refuse("rows is not a table")
        self.only(entry, {"index", "sizes", "exponents", "width", "axis"})
        sizes = tuple(self.items(entry, "sizes"))
        exponents = tuple(parse(each) for each in self.texts(entry, "exponents"))
        rows = Rows(
            self.integer(entry, "index"), sizes, exponents, self.integer(entry, "width"), self.integer(entry, "axis")
        )
        whole = all(type(each) is int and each > 0 for each in sizes)
        if not whole or len(sizes) != len(exponents) or rows.index >= len(sizes) or rows.width < 1:
            raise self.refuse("rows do not name a part of a larger tensor")
        return rows

    def node(self, entry: dict[str, Any], shapes: dict[str, Shape]) -> Node:
        """A node, whose shape its op confirms."""
        self.only(entry, {"op", "inputs", "output", "shape", "attrs", "where"})
        op, inputs, output = self.text(entry, "op"), self.texts(entry, "inputs"), self.text(entry, "output")
        if op not in OPS:
            raise self.refuse(f"there is no op {op!r}, which makes {output!r}")
        if missing := [each for each in inputs if each not in shapes]:
            raise self.refuse(f"{output!r} reads {missing[0]!r}, which nothing before it makes")
        if output in shapes:
            raise self.refuse(f"tensor {output!r} is made twice")
        raw = entry.get("attrs", {})
        if not isinstance(raw, dict):
            raise self.refuse(f"attrs of {output!r} is not a table")
        attrs = {key: self.attribute(key, value) for key, value in raw.items()}
        if missing := [key for key in REQUIRED.get(op, ()) if key not in attrs]:
            raise self.refuse(f"{op}, which makes {output!r}, lacks {missing[0]}")
        if op in ("scale", "scan"):
            attrs.setdefault("carrier" if op == "scale" else "state", None)
        if op == "scan" and len(inputs) != 3 + attrs["decay"] + attrs["strength"]:
            raise self.refuse(f"the scan that makes {output!r} has {len(inputs)} inputs")
        shape = self.shape(entry, "shape")
        try:
            made = OPS[op].shape([shapes[each] for each in inputs], attrs)
        except (DeriveError, ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
            raise self.refuse(f"{op} cannot make {output!r}: {error}") from None
        if made != shape:
            raise self.refuse(f"{output!r} has shape {shape_text(made)}, not {shape_text(shape)}")
        shapes[output] = shape
        where = self.text(entry, "where") if "where" in entry else ""
        return Node(op, inputs, output, shape, MappingProxyType(dict(sorted(attrs.items()))), where)

    def attribute(self, key: str, value: Any) -> Any:
        made = value
        if isinstance(value, dict):
            if set(value) == {"exponent"}:
                made = self.required(value, "exponent")
            elif set(value) == {"group"}:
                made = self.group(value["group"])
            elif set(value) == {"shape"}:
                made = self.shape(value, "shape")
        if not isinstance(made, ATTRIBUTES.get(key, (bool, int, float, str))):
            raise self.refuse(f"attribute {key} is {value!r}")
        return made

    def shape(self, entry: Mapping[str, Any], key: str) -> Shape:
        return tuple(self.group(each) for each in self.items(entry, key))

    def group(self, value: Any) -> Group:
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise self.refuse(f"{value!r} is no list of axes")
        if missing := [each for each in value if each not in self.dims]:
            raise self.refuse(f"there is no axis {missing[0]!r}")
        return Group(tuple(self.dims[each] for each in value))

    def pair(self, value: Any) -> tuple[str, str]:
        if not isinstance(value, list) or len(value) != 2 or not all(isinstance(each, str) for each in value):
            raise self.refuse(f"{value!r} is no pair of tensors")
        return value[0], value[1]

    def items(self, entry: Mapping[str, Any], key: str) -> list[Any]:
        value = entry.get(key)
        if not isinstance(value, list):
            raise self.refuse(f"{key} is missing or not a list")
        return value

    def integer(self, entry: Mapping[str, Any], key: str) -> int:
        value = entry.get(key)
        if type(value) is not int or value < 0:
            raise self.refuse(f"{key} is missing or no natural number")
        return value

    def number(self, entry: Mapping[str, Any], key: str) -> float:
        value = entry.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.refuse(f"{key} is missing or no number")
        return float(value)

    def switch(self, entry: Mapping[str, Any], key: str, default: bool) -> bool:
        value = entry.get(key, default)
        if not isinstance(value, bool):
            raise self.refuse(f"{key} is neither true nor false")
        return value
