"""Graphs as files: byte for byte there and back, and read with suspicion."""

import contextlib

import pytest

from widthwise.derive import Builder, architecture, derive
from widthwise.derive.architectures import ARCHITECTURES
from widthwise.derive.errors import DeriveError
from widthwise.derive.graph_toml import read_graph, write_graph


@pytest.mark.parametrize("name", list(ARCHITECTURES))
@pytest.mark.parametrize("scaling", ["heads-fixed", "head-dim-fixed", "mixed"])
def test_round_trip(name: str, scaling: str) -> None:
    graph = architecture(name) if name == "mlp" else architecture(name, scaling=scaling, tied=True)
    text = write_graph(graph)
    again = read_graph(text)
    assert write_graph(again) == text
    optimizer = "sgd"
    assert derive(again, optimizer).hash == derive(graph, optimizer).hash


def test_comments_do_not_matter() -> None:
    graph = architecture("mlp")
    text = write_graph(graph, ("widthwise trace x:y", "axis n has 5 entries"))
    assert "# axis n has 5 entries\n" in text
    assert write_graph(read_graph(text)) == write_graph(graph)


def mlp_text() -> str:
    return write_graph(architecture("mlp"))


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ('kind = "widthwise graph 1"', 'kind = "rules"', "kind is 'rules'"),
        ('op = "relu"', 'op = "eval"', "there is no op 'eval'"),
        ('exponent = "1"', 'exponent = "__import__(1)"', "is not an exponent"),
        ('law = "zeros"', 'law = "magic"', "there is no law 'magic'"),
        ('    "x",\n    "input",', '    "x",\n    "nothing",', "reads 'nothing', which nothing before it makes"),
        ('    "x",\n    "input",', '    "x",', "cannot make"),
        ('output = "z_in"', 'output = "x"', "tensor 'x' is made twice"),
        ("practical = 4096", 'practical = "many"', "practical is missing or no natural number"),
        ('role = "hidden"', 'role = "input"', "parameter 'input' is declared twice"),
        ('op = "cross_entropy"', 'op = "relu"', "cannot make|has shape|no loss"),
        ("carries = [", "unknown = 1\ncarries = [", "unknown key 'unknown'"),
        ('        "relu(z)",', '        "other",', "there is no tensor .other."),
    ],
)
def test_refused(before: str, after: str, said: str) -> None:
    text = mlp_text()
    if before not in text:
        pytest.skip(f"{before} is not in the file")
    with pytest.raises(DeriveError, match=said):
        read_graph(text.replace(before, after, 1))


def test_a_wrong_shape_is_refused() -> None:
    text = mlp_text()
    node = text.index('op = "relu"')
    with pytest.raises(DeriveError, match=r"'relu\(z_in\)' has shape \[n\], not \[classes\]"):
        read_graph(text[:node] + text[node:].replace('"n",', '"classes",', 1))


def test_not_toml_and_too_large() -> None:
    with pytest.raises(DeriveError, match="is not TOML"):
        read_graph("kind = [")
    with pytest.raises(DeriveError, match="larger than any graph"):
        read_graph("#" * 5_000_000)


@pytest.mark.parametrize("position", range(0, 2600, 37))
def test_a_deleted_piece_never_crashes(position: int) -> None:
    text = mlp_text()
    with contextlib.suppress(DeriveError):
        read_graph(text[:position] + text[position + 20 :])


def test_rows() -> None:
    from dataclasses import replace
    from types import MappingProxyType

    from widthwise.derive.exponents import ONE, ZERO
    from widthwise.derive.graph import Rows

    graph = architecture("mlp")
    rows = Rows(1, (256, 16), (ONE, ZERO), 128, 1)
    packed = {role: replace(each, rows=rows) for role, each in graph.parameters.items()}
    graph = replace(graph, parameters=MappingProxyType(packed))
    text = write_graph(graph)
    assert read_graph(text).parameters["hidden"].rows == rows
    with pytest.raises(DeriveError, match="rows do not name a part"):
        read_graph(text.replace("index = 1", "index = 2", 1))


def test_what_no_file_can_hold() -> None:
    g = Builder("odd")
    x = g.op("relu", g.input("x", g.dim("n", 1)), secret=object())
    g.cross_entropy(g.readout(x, "out", g.dim("classes")))
    with pytest.raises(DeriveError, match="attribute secret"):
        write_graph(g.build())
