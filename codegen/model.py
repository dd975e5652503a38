"""What the model template is filled with: the graph as modules, in the order in which they are called.

layout.py and tree.py say which module calls which, fusion.py which nodes are one call of PyTorch, ops.py how a call is
written; forward.py and modules.py write the two methods of a class.
"""

from __future__ import annotations

from keyword import iskeyword
from math import isfinite
from typing import Any

from widthwise.codegen.expressions import root, spread
from widthwise.codegen.fusion import TOKENS
from widthwise.codegen.layout import Path
from widthwise.codegen.modules import Multiplier, config_size, module
from widthwise.codegen.text import WIDTH
from widthwise.codegen.tree import Tree, camel, class_names, identifiers
from widthwise.codegen.values import Names
from widthwise.derive import Graph, RuleTable
from widthwise.derive.errors import DeriveError
from widthwise.derive.exponents import ONE, ZERO
from widthwise.derive.graph import Dim, Node, Parameter, atoms, base_axis

_TAKEN = (
    "F Tensor nn torch Mapping Sequence annotations checkpointing dataclass hashlib re gated_delta_rule "
    "gated_delta_rule_step self config cache tokens targets loss Cache Config RMSNorm ShortConvolution AXES LAWS "
    "MULTIPLIERS super float int str bool tuple dict list sorted range round setattr staticmethod True False None"
)
TAKEN = frozenset(_TAKEN.split())  # names of the file, which no class and no local variable may hide
ARGUMENTS = frozenset(
    ("width", "depth", "norm_eps", "multipliers", "checkpoint", "seed", "dtype", "device", "self", "to", "sizes")
)
USUAL = {"taps": 4}
EPS = 1e-5


def context(graph: Graph, table: RuleTable) -> dict[str, Any]:
    """The template's variables.

    Raises:
        DeriveError: for a graph that no model of ours computes, naming the node and what can be done.
    """
    title = graph.title or camel(graph.name)
    for parameter in graph.parameters.values():
        for part in parameter.patterns[0].split("."):
            if part != "*":  # a layer that is a number has a name in other people's models, and none in ours
                _check(part, parameter.where)
    multipliers = _multiplied(graph, table)
    tree = Tree(graph, frozenset(multipliers))
    depths = _depths(tree)
    sizes = _sizes(graph)
    model_title = f"{title}LM" if any(node.op == "embedding" for node in graph.nodes) else title
    lists = {path[-2].removesuffix("s") for path in depths}
    names = Names(
        identifiers(tree, _check, TAKEN | lists),
        {name: carried[1] for name, carried in multipliers.items()},
        sizes,
        depths,
        class_names(tree, title, TAKEN | {model_title}),
    )
    placed = {
        name: Multiplier(role, attribute, _default(graph, names, graph.makers[name]))
        for name, (role, attribute) in multipliers.items()
    }
    modules = [module(tree, path, names, placed) for path in tree.paths]
    inputs, caches = tree.inputs(()), tree.inputs(()) == (TOKENS,) or tree.stateful(())
    model = modules[-1]
    assert model.forward is not None
    return {
        "title": model_title,
        "modules": modules[:-1],
        "model": model,
        "helpers": {helper for each in modules if each.forward for helper in each.forward.helpers},
        "axes": {"width": ONE, **dict.fromkeys(depths.values(), ZERO)}
        | {name: dim.exponent for dim, name in sorted(sizes.items(), key=lambda item: _place(item[1]))},
        "width_axis": next(dim.name for dim, name in sizes.items() if name == "width"),
        "usual": USUAL,
        "eps": _eps(graph),
        "multipliers": [(each.role, ".".join((*tree.where[name], each.attribute))) for name, each in placed.items()],
        "laws": [_law(parameter) for parameter in graph.parameters.values()],
        "generates": inputs == (TOKENS,),
        "caches": caches,
        "summary": model.forward.summary if len(model.forward.summary) < WIDTH - 12 else "The forward pass.",
        "signature": _signature(inputs, names, caches),
    }


def _signature(inputs: tuple[str, ...], names: Names, caches: bool) -> list[str]:
    """That of the whole model's forward pass."""
    given = [f"{names.variables[name]}: Tensor" for name in inputs]
    cache = ["cache: Cache | None = None"] * caches
    line = f"    def forward({', '.join(['self', *given, 'targets: Tensor | None = None', *cache])})"
    returns = "Tensor | tuple[Tensor, Tensor]"
    if len(line) + len(returns) + 5 <= WIDTH:
        return [f"{line} -> {returns}:"]
    parts = ("self", *given, "targets: Tensor | None = None", *cache)
    return spread("    def forward(", parts, f") -> {returns}:", 4)


def _multiplied(graph: Graph, table: RuleTable) -> dict[str, tuple[str, str]]:
    """(role, attribute) of each multiplier, by the tensor it is applied to: those that the description names, and those
    of weights whose rule has one."""
    exponents = {rule.role: rule.multiplier for rule in table.rules}
    found = {}
    for node in graph.ordered:
        carrier = node.attrs.get("carrier")
        weight = {"linear": node.inputs[-1:], "conv1d": node.inputs[-1:], "embedding": node.inputs}.get(node.op, ())
        role = str(carrier) if carrier else "".join(weight)
        if carrier or (role and exponents.get(role) not in (None, ZERO)):
            found[node.output] = (role, role if node.op == "scale" else f"{role}_multiplier")
    return found


def _law(parameter: Parameter) -> tuple[str, str, float, float]:
    """(pattern, name of the law, low, high)."""
    low, high = float(parameter.law.low), float(parameter.law.high)
    if not (isfinite(low) and isfinite(high)):
        raise DeriveError(
            f"{parameter.role} is drawn between {low} and {high}", where=parameter.where, cure="give a finite range"
        )
    return parameter.patterns[0], parameter.law.name, low, high


def _place(axis: str) -> int:
    """Where an axis stands among arguments: the vocabulary first, what has a usual size last."""
    return 0 if axis == "vocab" else 1 + (axis in USUAL)


def _default(graph: Graph, names: Names, node: Node) -> str:
    axis = base_axis(graph, node)
    return "1.0" if axis is None else root(config_size(names, axis))


def _sizes(graph: Graph) -> dict[Dim, str]:
    """The constructor's name for each axis.

    Raises:
        DeriveError: when an axis has the name of another argument, or none grows as the width itself.
    """
    shapes = [parameter.shape for parameter in graph.parameters.values()] + [node.shape for node in graph.ordered]
    dims = dict.fromkeys(dim for shape in shapes for dim in atoms(shape))
    width = next((dim for dim in dims if dim.exponent == ONE), None)
    if width is None:
        raise DeriveError("no axis grows as n^1, so that nothing says what the width is", cure="give one exponent 1")
    for dim in dims:
        if dim != width and (dim.name in ARGUMENTS or dim.name.endswith("_depth")):
            raise DeriveError(f"axis {dim.name!r} has the name of another argument of models", cure="rename it")
    return {width: "width"} | {dim: dim.name for dim in dims if dim != width}


def _depths(tree: Tree) -> dict[Path, str]:
    """The constructor's name for the length of each list of layers."""
    paths = list(tree.blocks)
    names = ["depth"] if len(paths) == 1 else [f"{path[-2]}_depth" for path in paths]
    if len(set(names)) < len(names):
        raise DeriveError(
            f"two lists of layers are called {' and '.join('.'.join(path) for path in paths)}", cure="rename one"
        )
    return dict(zip(paths, names, strict=True))


def _eps(graph: Graph) -> float:
    norms = [node for node in graph.ordered if node.op in ("rms_norm", "layer_norm")]
    found = {float(node.attrs["eps"]) for node in norms} or {EPS}
    if len(found) > 1 or not all(isfinite(eps) for eps in found):
        raise DeriveError(
            f"norms have the epsilons {', '.join(map(repr, sorted(found)))}, and a model has one",
            where=norms[0].where,
            cure="give all norms the same eps",
        )
    return found.pop()


def _check(name: str, where: str) -> None:
    if not (name.isascii() and name.isidentifier()) or iskeyword(name) or name.startswith("__"):
        raise DeriveError(f"{name!r} cannot be a name in code", where=where, cure="use ASCII letters, digits and _")
