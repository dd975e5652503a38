"""The gated delta rule: oracle, chunked PyTorch path, Triton kernels, custom op."""
