"""Whether a graph, run, has the tail that is derived of it: the smallest of many heads in front of a norm."""

import math

import pytest

pytest.importorskip("torch")
import torch

from widthwise.derive import architecture, derive
from widthwise.derive.exponents import ONE, ZERO
from widthwise.verify.coord.described import Described
from widthwise.verify.data import VOCABULARY


@pytest.mark.parametrize(("scaling", "derived"), [("heads-fixed", ZERO), ("head-dim-fixed", ONE)])
def test_the_graph_that_was_derived_does_so(scaling: str, derived: object) -> None:
    """Run it: by what power of n the largest head's 1/‖o‖ at the first token grows over the typical head's."""
    graph = architecture("gated_deltanet", scaling=scaling)
    table = derive(graph, "sgd")
    assert [each.exponent for each in table.findings if each.kind == "norm-tail"] == [derived]
    subject = Described(graph, table, 32, sizes={"vocab": VOCABULARY, "H": 8, "d_k": 8, "d_v": 8, "ffn": 32})
    tokens = torch.arange(VOCABULARY)[:, None]
    widths, logs = (32, 128, 512), []
    for width in widths:
        found = []
        for seed in range(4):
            o = subject.make(width, seed).forward({"tokens": tokens, "targets": tokens})["o"].detach()
            inverse = o.square().mean(-1).rsqrt().flatten(0, 1)  # [tokens, H]
            found.append((inverse.max(-1).values / inverse.median(-1).values).log().mean())
        logs.append(float(torch.stack(found).mean()))
    slope = (logs[-1] - logs[0]) / math.log(widths[-1] / widths[0])
    assert slope == pytest.approx(float(derived), abs=0.2)
