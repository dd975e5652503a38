"""The kernels under compute-sanitizer: no access outside a tensor or outside shared memory, no race in shared memory.

Each case is a process of its own (this file), whose small problems take every kind of launch there is: stages, copy
engine or pointers, whole and ragged chunks, packed sequences, value groups. Without torch's memory pool, in which a
tensor's neighbour hides what is read past its end.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# K, V: walks have three stages, and two above K = 192; fp32 is computed in fp16. What is no multiple
# of 8 is widened by zeros, and leaves blocks of K and V in part empty.
WIDTHS = {
    torch.float32: [(24, 48), (20, 20), (128, 128), (256, 512)],
    torch.bfloat16: [(32, 64), (20, 20), (33, 77), (130, 24), (128, 128), (192, 384)],
}
SUMMARY = {"memcheck": "ERROR SUMMARY: 0 errors", "racecheck": "RACECHECK SUMMARY: 0 hazards"}
LENGTHS = [0, 0, 1, 64, 130]


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("tool", SUMMARY)
@pytest.mark.parametrize(("dtype", "widths"), [(dtype, x) for dtype, some in WIDTHS.items() for x in some], ids=str)
def test_sanitizer(tool, dtype, widths):
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        pytest.skip("compute-sanitizer, of the CUDA toolkit, is not installed")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    }
    case = [sys.executable, __file__, str(dtype).removeprefix("torch."), *map(str, widths)]
    run = subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "9", *case],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert run.returncode == 0, (run.stdout + run.stderr)[-4000:]
    assert "done" in run.stdout
    assert SUMMARY[tool] in run.stdout, run.stdout[-2000:]


def main(dtype: torch.dtype, key_dim: int, value_dim: int) -> None:
    import test_triton

    from widthwise.kernels import gated_delta_rule_step

    def on_gpu(x):
        return None if x is None else x.cuda()

    def cut(x, offset):
        """``x`` as it lies in a wider projection, at the very end of its memory."""
        wide = torch.zeros(*x.shape[:-1], x.shape[-1] + offset, dtype=dtype, device="cuda")
        wide[..., offset:] = x
        return wide[..., offset:]

    for options, offset in (({}, 0), ({}, 3), ({}, 8), ({"cu": LENGTHS}, 0), ({"cu": LENGTHS}, 5)):
        inputs, initial, grads, cu = test_triton.draw(
            1, LENGTHS[-1], 1, 2, key_dim, value_dim, dtype, device="cpu", **options
        )
        inputs, grads, initial = tuple(map(on_gpu, inputs)), tuple(map(on_gpu, grads)), on_gpu(initial)
        if offset:
            inputs = (*(cut(x, offset) for x in inputs[:3]), *inputs[3:])
        test_triton.ours(inputs, initial, grads, on_gpu(cu))
    q, k, v, g, beta = (x[:, 0] for x in inputs)
    gated_delta_rule_step(q, k, v, g, beta, initial[:1], normalize_qk=True)
    torch.cuda.synchronize()
    print("done")


if __name__ == "__main__":
    main(getattr(torch, sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
