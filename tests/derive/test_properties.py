"""Properties that hold for every graph: gauge, scaling, naming, order, base width, optimality of the solution."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sympy import Expr, Rational, linsolve

from widthwise.derive import Builder, DeriveError, Graph, Rule, RuleTable, Tensor, architecture, derive
from widthwise.derive.assume import PRESETS, SETS, assumptions
from widthwise.derive.backward import Backward
from widthwise.derive.forward import Forward
from widthwise.derive.optimizers import OPTIMIZERS, Weight, optimizer
from widthwise.derive.solve import Knobs
from widthwise.derive.update import solve_updates

LAYERS = ("dense", "gated", "normed", "residual", "conv", "shared", "attention")
ONE = Rational(1)
ACTIVATIONS = ("relu", "silu", "gelu", "tanh")


@dataclass(frozen=True)
class Description:
    """A random architecture, as data: what to build, so that it can be built again in another guise."""

    widths: tuple[Expr, ...]
    layers: tuple[tuple[str, str], ...]

    def build(self, *, power: Expr = ONE, prefix: str = "", swap: bool = False) -> Graph:
        g = Builder("random")
        dims = [g.dim(f"{prefix}n{index}", power * width) for index, width in enumerate(self.widths)]
        heads, head = g.dim(f"{prefix}H", power * Rational(1, 3)), g.dim(f"{prefix}D", power * Rational(2, 3))
        taps = g.dim(f"{prefix}taps")
        x = g.linear(g.input(f"{prefix}data", g.dim(f"{prefix}F")), f"{prefix}first", dims[0])
        for index, (layer, activation) in enumerate(self.layers):
            out, name = dims[(index + 1) % len(dims)], f"{prefix}w{index}"

            def dense(role: str, source: Tensor, to: object, function: str = activation) -> Tensor:
                return g.pointwise(function, g.linear(source, role, to, bias=True))  # type: ignore[arg-type]

            if layer == "dense":
                x = dense(name, x, out)
            elif layer == "gated":
                a, b = (dense(f"{name}a", x, out), g.linear(x, f"{name}b", out))
                x = g.product(b, a) if swap else g.product(a, b)
            elif layer == "normed":
                x = g.norm(x, f"{name}gain")
            elif layer == "residual":
                branch = g.linear(dense(f"{name}up", g.norm(x), out), f"{name}down", x.shape[-1])
                x = g.residual(branch, x) if swap else g.residual(x, branch)
            elif layer == "conv":
                x = g.conv1d(x, name, taps)
            elif layer == "shared":
                y = g.norm(g.reshape(g.linear(x, name, heads * head), heads, head), f"{name}gain")
                x = g.reshape(y, heads * head)
            else:
                q, k, v = (g.reshape(g.linear(x, f"{name}{each}", heads * head), heads, head) for each in "qkv")
                x = g.reshape(g.attention(q, k, v, multiplier=f"{name}scale"), heads * head)
        g.cross_entropy(g.readout(g.norm(x, f"{prefix}final"), f"{prefix}head", g.dim(f"{prefix}classes")))
        return g.build()


fractions = st.sampled_from([Rational(1), Rational(1, 2), Rational(2, 3), Rational(0)])
descriptions = st.builds(
    Description,
    st.lists(fractions, min_size=1, max_size=3).map(tuple),
    st.lists(st.tuples(st.sampled_from(LAYERS), st.sampled_from(ACTIVATIONS)), max_size=4).map(tuple),
)
optimizers = st.sampled_from(sorted(OPTIMIZERS))
sets = st.sampled_from([*SETS, *PRESETS])
quick = settings(max_examples=40, deadline=None)


def solve(graph: Graph, name: str, assume: str) -> RuleTable:
    return derive(graph, name, **{"preset" if assume in PRESETS else "assume": assume})


def knobs(table: RuleTable) -> list[tuple[Expr | None, ...]]:
    return [knobs_of(rule) for rule in table.rules]


@quick
@given(descriptions, optimizers, sets, st.sampled_from([Rational(1, 2), Rational(1, 3)]))
def test_a_power_of_the_width_scales_every_exponent(made: Description, name: str, assume: str, power: Expr) -> None:
    one, other = solve(made.build(), name, assume), solve(made.build(power=power), name, assume)
    assert [tuple(each and each * power for each in row) for row in knobs(one)] == knobs(other)
    assert [size.forward * power for size in one.tensors] == [size.forward for size in other.tensors]


@quick
@given(descriptions, optimizers, sets)
def test_names_and_order_change_nothing(made: Description, name: str, assume: str) -> None:
    table = solve(made.build(), name, assume)
    assert knobs(solve(made.build(prefix="other_"), name, assume)) == knobs(table)
    graph = made.build()
    shuffled = solve(replace(graph, nodes=graph.nodes[::-1]), name, assume)
    assert {rule.role: knobs_of(rule) for rule in shuffled.rules} == {rule.role: knobs_of(rule) for rule in table.rules}
    swapped = solve(made.build(swap=True), name, assume)
    assert {rule.role: rule.lr for rule in swapped.rules} == {rule.role: rule.lr for rule in table.rules}


@quick
@given(descriptions, optimizers, st.integers(8, 4096))
def test_base_width_is_an_exact_no_op(made: Description, name: str, width: int) -> None:
    for rule in solve(made.build(), name, "at-init").rules:
        assert set(rule.factors(width, width).values()) <= {1.0}


@quick
@given(descriptions, optimizers, sets)
def test_the_solution_holds_and_no_learning_rate_can_be_raised(made: Description, name: str, assume: str) -> None:
    chosen = assumptions(preset=assume) if assume in PRESETS else assumptions(assume)
    walk = Backward(Forward(made.build(), chosen, Knobs()).run()).run()
    assert walk.knobs.holds()
    assert not walk.knobs.violations
    for update in solve_updates(walk, optimizer(name), {}).values():
        slack = [bound - effect.value - update.lr for effect, bound in zip(update.effects, update.bounds, strict=True)]
        assert min(slack) == 0  # none is exceeded, and one is met exactly: raising lr would break it


@quick
@given(descriptions, sets)
def test_the_active_set_solved_at_once_gives_the_same_knobs(made: Description, assume: str) -> None:
    """Elimination knob by knob against sympy's linsolve on all binding constraints together."""
    chosen = assumptions(preset=assume) if assume in PRESETS else assumptions(assume)
    solved = Forward(made.build(), chosen, Knobs()).run().knobs
    symbols = sorted(solved.tight, key=str)
    fixed = {symbol: value for symbol, value in solved.values.items() if symbol not in solved.tight}
    equations = [(each.form - each.bound).subs(fixed) for each in solved.tight.values()]
    (point,) = linsolve(equations, symbols)
    assert dict(zip(symbols, point, strict=True)) == {symbol: solved.values[symbol] for symbol in symbols}


@quick
@given(descriptions, st.sampled_from(["sgd", "adam", "adamw", "lion", "adafactor"]), fractions)
def test_gauge_moves_leave_the_function_alone(made: Description, name: str, theta: Expr) -> None:
    """(multiplier, init) → (+θ, −θ): every tensor stays; the learning rate moves as the optimizer's law says."""
    graph = made.build()
    table = solve(graph, name, "at-init")
    first, head = table.rule("first"), table.rule("head")
    moved = derive(
        graph,
        name,
        fix={
            "first.multiplier": theta,
            "first.init_std": first.init_std - theta,
            "head.multiplier": head.multiplier - theta,
            "head.init_std": head.init_std + theta,
        },
    )
    assert [(each.forward, each.gradient) for each in moved.tensors] == [
        (each.forward, each.gradient) for each in table.tensors
    ]
    law = optimizer(name)
    weigh = [Weight(gradient, entry) for gradient, entry in ((Rational(0), Rational(0)), (theta, -theta))]
    step = law.step(weigh[1]).entry - law.step(weigh[0]).entry
    assert moved.rule("first").lr == first.lr - theta - step


@pytest.mark.parametrize("name", ["sgd", "adamw", "adafactor"])
@pytest.mark.parametrize(("which", "readout"), [("mlp", "output"), ("transformer", "lm_head")])
def test_the_absorbed_gauge_is_what_pinning_its_knobs_derives(name: str, which: str, readout: str) -> None:
    graph = architecture(which)
    absorbed = derive(graph, name, gauge="absorbed").rule(readout)
    pinned = derive(graph, name, fix={f"{readout}.multiplier": 0, f"{readout}.init_std": absorbed.init_std})
    assert knobs_of(pinned.rule(readout)) == knobs_of(absorbed)


def knobs_of(rule: Rule) -> tuple[Expr | None, ...]:
    return (rule.init_std, rule.multiplier, rule.lr, rule.weight_decay, rule.eps)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_repeated_block_is_its_layers_written_out(name: str) -> None:
    once = derive(architecture("mlp", bias=False), name)
    g = Builder("written out")
    width = g.dim("n", 1)
    h = g.pointwise("relu", g.linear(g.input("x", g.dim("F")), "input", width))
    for role in ("hidden", "hidden2", "hidden3"):
        h = g.pointwise("relu", g.linear(h, role, width))
    g.cross_entropy(g.readout(h, "output", g.dim("C")))
    written = derive(g.build(), name)
    for role in ("hidden", "hidden2", "hidden3"):
        assert knobs_of(written.rule(role)) == knobs_of(once.rule("hidden"))


def test_a_block_that_changes_size_cannot_repeat() -> None:
    g = Builder("drifting")
    width = g.dim("n", 1)
    h = g.norm(g.linear(g.input("x", g.dim("F")), "first", width))
    h = g.repeat("layers", 3, lambda x: g.scale(g.pointwise("relu", g.linear(x, "w", width)), "-1/2"), h)
    g.cross_entropy(g.readout(h, "head", g.dim("C")))
    with pytest.raises(DeriveError, match="a repeated block takes"):
        derive(g.build())
