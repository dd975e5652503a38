"""One file a family of ops; importing this package fills the registry."""

from widthwise.derive.ops import einsum, norm, pointwise, scan, structure, weights
from widthwise.derive.ops.registry import OPS, Op

__all__ = ["OPS", "Op", "einsum", "norm", "pointwise", "scan", "structure", "weights"]
