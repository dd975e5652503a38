"""FLA's name and argument names for the scan: a model swaps ``chunk_gated_delta_rule`` by changing an import."""

from torch import Tensor

from widthwise.kernels.op import gated_delta_rule


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``fla.ops.gated_delta_rule.chunk_gated_delta_rule`` (FLA 0.6.0), computed by
    :func:`widthwise.kernels.gated_delta_rule`, whose shapes and errors it has. An argument of FLA's that is not named
    here (``head_first``, ``cp_context``, ...) is a TypeError rather than ignored."""
    return gated_delta_rule(
        q,
        k,
        v,
        g,
        beta,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        normalize_qk=use_qk_l2norm_in_kernel,
        cu_seqlens=cu_seqlens,
    )
