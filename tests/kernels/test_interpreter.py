"""The Triton kernels in Triton's interpreter, at tiny shapes, against the float64 oracle.

It must be switched on before triton is imported, so the cases run in a process of their own: this file.
"""

import os
import subprocess
import sys
from pathlib import Path

import torch

from widthwise.kernels import gated_delta_rule, triton_half, triton_launch


class Rule(torch.nn.Module):
    def forward(self, q, k, v, g, beta):
        return gated_delta_rule(q, k, v, g, beta, normalize_qk=True)[0]


def main() -> None:
    """Prints nothing when all is well. fp32 is exact in the interpreter, so the bound is too."""
    from test_triton import draw, errors, fast_oracle, oracle, ours, unkept_is_the_same, worst

    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    shapes = [
        ((1, 130, 1, 1, 16, 16, fp32), {}, True),
        ((1, 1, 1, 2, 16, 32, fp32), {}, True),
        ((2, 64, 1, 2, 24, 48, fp32), {}, True),
        ((1, 65, 2, 1, 32, 16, fp32), {}, False),
        ((1, 70, 1, 1, 130, 24, fp32), {}, True),
        ((1, 70, 1, 1, 40, 80, fp32), {}, True),  # from here on V in several blocks, the gradients in one pass
        ((1, 140, 1, 2, 80, 136, fp32), {"cu": [0, 0, 1, 64, 65, 65, 140]}, True),
        ((1, 70, 1, 1, 136, 136, fp16), {}, True),  # in two
        ((1, 100, 1, 1, 16, 16, fp32), {"g": 0.0, "beta": 1.0}, True),
        ((1, 100, 1, 1, 16, 16, fp32), {"g": -50.0}, True),
        ((1, 100, 1, 1, 16, 16, fp32), {"g": -1e4, "beta": 0.0}, True),
        ((1, 140, 1, 2, 16, 16, fp32), {"cu": [0, 0, 1, 64, 65, 65, 140]}, True),
        ((1, 70, 1, 1, 32, 16, bf16), {}, True),
        ((1, 70, 1, 1, 32, 16, fp16), {}, True),
        ((2, 70, 1, 2, 24, 48, fp16), {}, True),  # tiles through descriptors, which reach past T and past K
        ((1, 70, 1, 1, 20, 24, fp16), {}, True),  # steps that descriptors cannot take
    ]
    for shape, options, normalize in shapes:
        case = draw(*shape, **options, device="cpu")
        if not normalize:
            case[0][1].copy_(torch.nn.functional.normalize(case[0][1].float(), dim=-1))
        bound = 1e-5 if shape[-1] == fp32 else 6e-3
        if (error := worst(case, normalize)) > bound:
            print(shape, options, normalize, errors(ours(*case, normalize), oracle(*case, normalize)), error)
    # What is not kept for the backward pass is computed again.
    if not unkept_is_the_same(draw(1, 130, 1, 2, 16, 32, fp32, device="cpu")):
        print("keep")
    # Gates near 1: the backward pass has the states of the forward pass to the bit, or they drift apart (0.0027 here).
    shortest, triton_launch.SHORTEST = triton_launch.SHORTEST, 1280
    case = draw(1, 1280, 1, 1, 16, 16, fp16, g=-1e-4, device="cpu")
    if (error := worst(case, reference=fast_oracle)) > 1.5e-3:
        print("slow gates", error)
    # A sequence walked in several places at once.
    triton_launch.SHORTEST = 1
    for shape in [(1, 330, 1, 1, 16, 16, fp32), (2, 330, 1, 2, 24, 80, fp32), (1, 330, 2, 1, 32, 16, fp16)]:
        case = draw(*shape, device="cpu")
        if (error := worst(case)) > (1e-5 if shape[-1] == fp32 else 6e-3):
            print("segments", shape, error)
    triton_launch.SHORTEST = shortest
    # fp32 as fp16 with exact scales, as on a GPU: at any magnitude, behind any decay, whatever flows back the more.
    halved = [(70, size, normalize, {}) for size, normalize in ((1.0, True), (1e8, True), (1e3, False))]
    halved += [(length, 1.0, True, {"g": g}) for length, g in ((1, -50.0), (15, -50.0), (70, -50.0), (70, -1e4))]
    halved += [(200, 1e-12, False, {}), (70, 1.0, True, {"g": -50.0, "beta": 0.0})]
    for length, magnitude, normalize, fixed in halved:
        (q, k, v, g, beta), initial, (do, dfinal), _ = draw(1, length, 1, 2, 16, 32, fp32, **fixed, device="cpu")
        if not normalize:
            q, k = q * magnitude, torch.nn.functional.normalize(k, dim=-1)
        case = ((q, k, v * magnitude, g, beta), initial * magnitude, (do * 1e-6, dfinal * 1e-6), None)
        rest = (16**-0.5, case[1], None, normalize)
        o, final, saved = triton_half.forward(*case[0], *rest)
        found = errors((o, final, *triton_half.backward(*case[2], *case[0], *rest, saved)), oracle(*case, normalize))
        if max(found.values()) > 3e-3:
            print("fp32 by fp16", length, magnitude, normalize, fixed, found)
    # A trace whose length is open: nothing may be decided by it, how a sequence is cut up neither.
    names = ("q", "k", "v", "g", "beta")
    tokens = dict(zip(names, draw(2, 70, 1, 1, 16, 16, fp32, device="cpu")[0], strict=True))
    time = {1: torch.export.Dim("time", min=2, max=4096)}
    program = torch.export.export(Rule(), (), tokens, dynamic_shapes=dict.fromkeys(names, time)).module()
    longer = dict(zip(names, draw(2, 129, 1, 1, 16, 16, fp32, device="cpu")[0], strict=True))
    if not torch.equal(program(**longer), Rule()(**longer)):
        print("export")
    # Strided views: q, k, v cut from one projection.
    packed = torch.randn(1, 70, 3, 1, 16)
    case = draw(1, 70, 1, 1, 16, 16, fp32, device="cpu")
    strided = ((*packed.unbind(2), *case[0][3:]), *case[1:])
    if (error := worst(strided)) > 1e-5:
        print("strided", error)


def test_interpreter():
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root / "src"), "PYTHONWARNINGS": "ignore"}
    run = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout == ""


if __name__ == "__main__":
    main()
