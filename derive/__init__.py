"""Description → sizes → rules, with proofs. sympy and networkx; never torch.

>>> from widthwise.derive import architecture, derive
>>> derive(architecture("mlp"), "adam").rule("hidden").as_dict()["lr"]
'-1'
"""

from widthwise.derive.architectures import ARCHITECTURES, architecture
from widthwise.derive.assume import PRESETS, SETS, Assumptions
from widthwise.derive.builder import Builder, Tensor
from widthwise.derive.errors import DeriveError
from widthwise.derive.graph import Dim, Graph
from widthwise.derive.optimizers import OPTIMIZERS
from widthwise.derive.pipeline import derive
from widthwise.derive.proof import proof_lines
from widthwise.derive.table import Finding, Rule, RuleTable, TensorSize
from widthwise.derive.toml_io import read_toml, write_toml

__all__ = [
    "ARCHITECTURES",
    "OPTIMIZERS",
    "PRESETS",
    "SETS",
    "Assumptions",
    "Builder",
    "DeriveError",
    "Dim",
    "Finding",
    "Graph",
    "Rule",
    "RuleTable",
    "Tensor",
    "TensorSize",
    "architecture",
    "derive",
    "proof_lines",
    "read_toml",
    "write_toml",
]
