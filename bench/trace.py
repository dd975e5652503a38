"""What tracing costs at published sizes: ``widthwise trace`` and ``widthwise derive``, each in a fresh process.

python bench/trace.py            # prints the table of docs/results/tracing.md; four minutes on two idle cores
"""

import os
import platform
import sys
import tempfile
import time
from pathlib import Path

MODELS = Path(__file__).resolve().parent.parent / "tests" / "verify" / "trace"
sys.path.insert(0, str(MODELS))

import torch  # noqa: E402
from full_size_models import WIDTHS  # noqa: E402

CORES = "2"


def run(*words: str) -> tuple[float, float, float]:
    """Wall seconds, seconds of processors, GiB of a command of ours.

    Raises:
        SystemExit: when it fails.
    """
    begun = time.perf_counter()
    where = {**os.environ, "PYTHONPATH": os.pathsep.join([str(MODELS), *sys.path]), "OMP_NUM_THREADS": CORES}
    child = os.posix_spawn(sys.executable, [sys.executable, "-m", "widthwise", *words], where)
    _, status, used = os.wait4(child, 0)
    if status:
        raise SystemExit(f"failed: widthwise {' '.join(words)}")
    return time.perf_counter() - begun, used.ru_utime + used.ru_stime, used.ru_maxrss / 2**20


def main() -> None:
    import transformers

    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}, "
        f"OMP_NUM_THREADS={CORES}; each at its published width, twice and three times that, in one process.\n"
    )
    print("| | width | trace, wall | trace, processor | peak memory | derive, wall |\n|---|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        for name, width in WIDTHS.items():
            file = f"{folder}/{name}.toml"
            widths = [str(width * times) for times in (1, 2, 3)]
            wall, processor, memory = run("trace", f"full_size_models:{name}", "--widths", *widths, "-o", file)
            derived, _, _ = run("derive", file, "--optimizer", "adamw", "-o", f"{folder}/{name}.md")
            print(
                f"| {name} | {width} | {wall:.1f} s | {processor:.1f} s | {memory:.1f} GiB | {derived:.1f} s |",
                flush=True,
            )


if __name__ == "__main__":
    main()
