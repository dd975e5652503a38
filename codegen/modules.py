"""The constructor of one module: layers, parameters and modules in the order in which they are called."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from widthwise.codegen.expressions import product_of, spread
from widthwise.codegen.forward import Forward
from widthwise.codegen.layout import Path, home, module_of
from widthwise.codegen.text import WIDTH
from widthwise.codegen.tree import Tree
from widthwise.codegen.values import Names
from widthwise.derive.errors import DeriveError
from widthwise.derive.graph import Group, Parameter

_OWN = (
    "add_module apply bfloat16 buffers call_super_init children compile cpu cuda double dump_patches eval extra_repr "
    "float forward get_buffer get_extra_state get_parameter get_submodule half ipu load_state_dict modules mtia "
    "named_buffers named_children named_modules named_parameters parameters register_backward_hook register_buffer "
    "register_forward_hook register_forward_pre_hook register_full_backward_hook register_full_backward_pre_hook "
    "register_load_state_dict_post_hook register_load_state_dict_pre_hook register_module register_parameter "
    "register_state_dict_post_hook register_state_dict_pre_hook requires_grad_ set_extra_state set_submodule "
    "share_memory state_dict to to_empty train training type xpu zero_grad T_destination "
    "checkpoint norm_eps generate widened reset_parameters"
)
RESERVED = frozenset(_OWN.split())  # what nn.Module and generated classes have of their own


@dataclass(frozen=True)
class Multiplier:
    """A float attribute of a module, which its forward pass multiplies by."""

    role: str
    attribute: str
    default: str


@dataclass(frozen=True)
class Module:
    """A class of the file. ``forward`` is None where the module only holds parameters; ``signature`` is that of its
    forward pass, as lines."""

    title: str
    doc: str
    setup: tuple[str, ...]
    signature: tuple[str, ...]
    forward: Forward | None


def module(tree: Tree, path: Path, names: Names, multipliers: Mapping[str, Multiplier]) -> Module:
    """The class of one container.

    Raises:
        DeriveError: for names that are in each other's way, and for parameters that no layer holds.
    """
    forward = Forward(tree, names, path) if not path or tree.runs(path) else None
    settings: list[str] = []
    if forward:
        settings += forward.sizes
        settings += ["norm_eps"] * forward.eps + ["checkpoint"] * ("checkpoint" in forward.helpers)
    attributes = [(name, f"config.{name}") for name in settings]
    attributes += [(each.attribute, each.default) for name, each in multipliers.items() if tree.where[name] == path]
    attributes += _members(tree, path, names)
    place = ".".join(path) or "the model"
    for at, (name, _) in enumerate(attributes):
        if name in {other for other, _ in attributes[:at]} or (
            (name in RESERVED or name.startswith("_")) and name not in settings
        ):
            raise DeriveError(f"{place} has or needs another attribute {name!r}", cure="give it another name")
    setup = [line for name, text in attributes for line in _assignment(name, text)]
    setup += [
        f"        self.{'.'.join(parameter.patterns[0].split('.')[len(path) :])}.requires_grad_(False)"
        for parameter in tree.graph.parameters.values()
        if home(parameter) == path and not parameter.trainable
    ]
    doc = f"``{place}``" + (f": {forward.summary}" if forward else "") + "."
    short = doc if len(doc) <= WIDTH - 10 else f"``{place}``."
    return Module(names.titles.get(path, ""), short, tuple(setup), _signature(tree, forward), forward)


def _signature(tree: Tree, forward: Forward | None) -> tuple[str, ...]:
    if forward is None:
        return ()
    cache = ["cache: Cache | None = None"] * tree.stateful(forward.path)
    parts = ("self", *(f"{name}: Tensor" for name in forward.arguments), *cache)
    count = len(tree.outputs(forward.path))
    returned = "Tensor" if count == 1 else f"tuple[{', '.join(['Tensor'] * count)}]"
    line = f"    def forward({', '.join(parts)}) -> {returned}:"
    return (line,) if len(line) <= WIDTH else tuple(spread("    def forward(", parts, f") -> {returned}:", 4))


def _assignment(name: str, text: str) -> list[str]:
    line = f"        self.{name} = {text}"
    if len(line) <= WIDTH:
        return [line]
    function, _, arguments = text.partition("(")
    return spread(f"        self.{name} = {function}(", tuple(arguments[:-1].split(", ")), ")", 8)


def _members(tree: Tree, path: Path, names: Names) -> list[tuple[str, str]]:
    """Attributes that hold parameters, in the order of the forward pass."""
    found: dict[tuple[str, str], None] = {}
    for parameter in _in_order(tree):
        at = home(parameter)
        if at == path and module_of(parameter) == path:
            attribute, text = parameter.role, f"nn.Parameter(torch.empty({', '.join(_sizes(names, parameter))}))"
        elif at == path:
            attribute, text = module_of(parameter)[-1], _layer(tree, module_of(parameter), names)
        elif at[: len(path)] == path:
            inner = min((each for each in names.titles if _between(path, each, at)), key=len)
            repeated = inner[-1] == "*"
            attribute, text = inner[-2 if repeated else -1], f"{names.titles[inner]}(config)"
            if repeated:
                text = f"nn.ModuleList({text} for _ in range(config.{names.depths[inner]}))"
        else:
            continue
        found[attribute, text] = None
    return list(found)


def _between(path: Path, inner: Path, at: Path) -> bool:
    return len(path) < len(inner) and inner[: len(path)] == path and at[: len(inner)] == inner


def _in_order(tree: Tree) -> Iterator[Parameter]:
    for role in tree.graph.parameters:
        tree.first_reader(role)
    read = dict.fromkeys(name for node in tree.graph.ordered for name in node.inputs if name in tree.graph.parameters)
    yield from (tree.graph.parameters[role] for role in read)


def _sizes(names: Names, parameter: Parameter) -> list[str]:
    return [config_size(names, group) for group in parameter.shape]


def config_size(names: Names, group: Group) -> str:
    return product_of(group, lambda dim: f"config.{names.sizes[dim]}")


def _layer(tree: Tree, path: Path, names: Names) -> str:
    """The constructor of the layer that holds the parameters of this module."""
    inside = {each.role: each for each in tree.graph.parameters.values() if module_of(each) == path}
    weight = inside.pop(path[-1], None)
    reader = tree.first_reader(path[-1]) if weight else None
    if weight is None or reader is None or set(inside) - {f"{path[-1]}_bias"} or (inside and reader.op != "linear"):
        raise DeriveError(
            f"no layer holds {', '.join(inside)} of {'.'.join(path)}",
            where=next(each.where for each in tree.graph.parameters.values() if module_of(each) == path),
            cure="declare it with Builder.parameter",
        )
    sizes = _sizes(names, weight)
    if reader.op == "linear" and len(sizes) == 2:
        return f"nn.Linear({sizes[1]}, {sizes[0]}, bias={bool(inside)})"
    if reader.op in ("embedding", "conv1d") and len(sizes) == 2:
        return f"{'nn.Embedding' if reader.op == 'embedding' else 'ShortConvolution'}({', '.join(sizes)})"
    norm = tree.graph.makers.get(reader.inputs[0])
    if norm and reader.output in tree.calls and tree.calls[reader.output].kind == "norm":
        if norm.op == "rms_norm":
            return f"RMSNorm({sizes[0]}, eps=config.norm_eps)"
        return f"nn.LayerNorm({sizes[0]}, eps=config.norm_eps, bias=False)"
    raise DeriveError(
        f"no layer holds {weight.role!r}", where=weight.where, cure="declare it with Builder.parameter, without a layer"
    )
