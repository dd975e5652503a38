"""The gated delta rule: oracle, chunked PyTorch path, Triton kernels, custom op."""

from widthwise.kernels.decode import gated_delta_rule_step
from widthwise.kernels.op import gated_delta_rule
from widthwise.kernels.reference import gated_delta_rule_reference

__all__ = ["gated_delta_rule", "gated_delta_rule_reference", "gated_delta_rule_step"]
