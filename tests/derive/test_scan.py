"""The scan's one rule, held against the same recurrence unrolled from primitive ops."""

from collections.abc import Callable

import pytest

from widthwise.derive import Builder, Graph, Tensor, architecture, derive
from widthwise.derive.architectures.common import head_scaling
from widthwise.derive.assume import assumptions
from widthwise.derive.backward import Backward
from widthwise.derive.exponents import show
from widthwise.derive.forward import Forward
from widthwise.derive.laws import NORMAL
from widthwise.derive.solve import Knobs

STEPS = 3


def model(scaling: str, activation: bool, unrolled: bool) -> Graph:
    """A gated delta layer; unrolled, each of three tokens has its own input and the last one is read out."""
    split = head_scaling(scaling)
    g = Builder("unrolled" if unrolled else "scan")
    width, heads = g.dim("d_model", 1), g.dim("H", split.heads)
    d_k, d_v = g.dim("d_k", split.head_dim, practical=256), g.dim("d_v", split.head_dim, practical=256)
    weights: dict[str, Tensor] = {}

    def linear(x: Tensor, name: str, out: object) -> Tensor:
        if name not in weights:
            weights[name] = g.parameter(name, out, width, law=NORMAL)  # type: ignore[arg-type]
        return g.op("linear", x, weights[name])

    def act(z: Tensor) -> Tensor:
        return g.pointwise("silu", z) if activation else z

    def token(h: Tensor, t: str) -> dict[str, Tensor]:
        def norm(name: str) -> Tensor:
            return g.norm(g.reshape(act(linear(h, name, heads * d_k)), heads, d_k), kind="l2_norm", output=f"{name}{t}")

        return {
            "q": norm("q"),
            "k": norm("k"),
            "v": g.reshape(act(linear(h, "v", heads * d_v)), heads, d_v, output=f"v{t}"),
            "alpha": g.pointwise("sigmoid", linear(h, "a", heads), output=f"alpha{t}"),
            "beta": g.pointwise("sigmoid", linear(h, "b", heads), output=f"beta{t}"),
        }

    embed = g.linear(g.input("features", g.dim("F")), "first", width, output="x")
    h = g.norm(embed, output="h")
    if not unrolled:
        one = token(h, "1")
        o = g.scan(one["q"], one["k"], one["v"], decay=one["alpha"], strength=one["beta"], output="o")
    else:
        o = recurrence(g, [token(g.norm(embed, output=f"h{t}"), str(t)) for t in range(1, STEPS + 1)], heads, d_k, d_v)
    y = g.reshape(g.norm(g.scale(o, multiplier="o_scale"), output="o_normed"), heads * d_v)
    g.cross_entropy(g.readout(g.norm(g.linear(y, "out", width)), "lm_head", g.dim("vocab")))
    return g.build()


def recurrence(g: Builder, tokens: list[dict[str, Tensor]], heads: object, d_k: object, d_v: object) -> Tensor:
    """S ← α S (I − β k kᵀ) + β v kᵀ, token by token; o = S q at the last one."""
    state: Tensor | None = None
    for token in tokens:
        k, beta = token["k"], token["beta"]
        write = g.contract(g.contract(token["v"], beta, heads, d_v), k, heads, d_v, d_k)
        if state is None:
            state = write
        else:
            state = g.contract(state, token["alpha"], heads, d_v, d_k)
            held = g.contract(state, k, heads, d_v)
            erase = g.contract(g.contract(held, beta, heads, d_v), k, heads, d_v, d_k)
            state = g.add(state, erase, write)
    return g.contract(state, tokens[-1]["q"], heads, d_v, output="o")


def walked(graph: Graph, assume: str, regime: str | None) -> Backward:
    return Backward(Forward(graph, assumptions(assume, regime=regime), Knobs()).run()).run()


# Past the crossovers without SiLU the two differ by design: the unrolled recurrence aligns (∂L/∂S)·k as one product
# of forward and backward, while the scan's rule knows that q·k is inside it, and that no nonlinearity gave it a mean.
@pytest.mark.parametrize(
    ("assume", "regime", "activation"),
    [
        ("at-init", "practical", True),
        ("at-init", "practical", False),
        ("at-init", "asymptotic", True),
        ("aligned", None, True),
        ("aligned", None, False),
        ("unaligned", None, True),
        ("unaligned", None, False),
    ],
)
@pytest.mark.parametrize("scaling", ["heads-fixed", "head-dim-fixed", "mixed"])
def test_scan_rule_equals_the_unrolled_recurrence(
    scaling: str, assume: str, regime: str | None, activation: bool
) -> None:
    scan, unrolled = (walked(model(scaling, activation, each), assume, regime) for each in (False, True))
    assert show(scan.states["o"].init.size) == show(unrolled.states["o"].init.size)

    def gradient(walk: Backward, name: str) -> str:
        return show(walk.gradients[name].size)

    for role in ("q", "k", "v", "a", "b"):
        assert gradient(scan, role) == gradient(unrolled, role), role


def test_scan_rules_are_the_unrolled_rules() -> None:
    for optimizer in ("sgd", "adamw"):
        one, other = (derive(model("heads-fixed", True, each), optimizer) for each in (False, True))
        for rule in one.rules:
            twin = other.rule(rule.role)
            assert (rule.init_std, rule.multiplier, rule.lr) == (twin.init_std, twin.multiplier, twin.lr), rule.role


@pytest.mark.parametrize("build", [lambda: architecture("mamba2"), lambda: architecture("gated_linear_attention")])
def test_gates_of_other_shapes(build: Callable[[], Graph]) -> None:
    """A decay per key channel, and keys shared by all heads, have their gradients summed over what they lack."""
    graph = build()
    table = derive(graph, "sgd")
    assert all(rule.lr is not None for rule in table.rules if rule.parameters)
