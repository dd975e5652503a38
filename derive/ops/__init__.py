"""One file a family of ops; importing this package fills the registry."""

from widthwise.derive.ops import convolution, einsum, norm, pointwise, scan, structure, weights
from widthwise.derive.ops.registry import OPS, Op

__all__ = ["OPS", "Op", "convolution", "einsum", "norm", "pointwise", "scan", "structure", "weights"]
