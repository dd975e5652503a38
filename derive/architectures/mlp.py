"""A multilayer perceptron: the setting in which μP was first derived."""

from __future__ import annotations

from widthwise.derive.builder import Builder, Tensor
from widthwise.derive.graph import Graph


def mlp(*, activation: str = "relu", bias: bool = True, depth: int = 3, dims: tuple[str, ...] = ()) -> Graph:
    """Inputs of a fixed number of features, hidden layers of Θ(n) units, a readout to a fixed number of classes.

    ``dims`` replaces the equal hidden layers by one layer for each exponent given, for widths that grow
    differently.
    """
    g = Builder("mlp", title="MLP", activation=activation, bias=bias)
    classes = g.dim("classes")
    x = g.input("x", g.dim("features"))

    def act(z: Tensor) -> Tensor:
        return z if activation == "none" else g.pointwise(activation, z)

    if dims:
        for index, exponent in enumerate(dims, 1):
            width = g.dim(f"n{index}", exponent)
            x = act(g.linear(x, f"layer{index}", width, bias=bias, output=f"z{index}"))
    else:
        width = g.dim("n", 1)
        h = act(g.linear(x, "input", width, bias=bias, output="z_in"))
        x = g.repeat("layers", depth, lambda h: act(g.linear(h, "hidden", width, bias=bias, output="z")), h)
    g.cross_entropy(g.readout(x, "output", classes))
    return g.build()
