"""How long a derivation takes: cold on the command line, and whether depth costs anything.

python bench/derive.py            # prints the table of docs/results/derive.md
"""

import os
import platform
import statistics
import subprocess
import sys
import time

from widthwise.derive import architecture, derive

RUNS = 7


def cold() -> float:
    """Median wall seconds of ``widthwise derive gated_deltanet`` in a fresh process."""
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "widthwise", "derive", "gated_deltanet"], check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def warm(depth: int) -> float:
    """Median milliseconds of describing and deriving a model of that depth in a warm process."""
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        derive(architecture("gated_deltanet", depth=depth), "adamw")
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def main() -> None:
    warm(2)
    print(f"Python {platform.python_version()}, {os.cpu_count()} cores, medians of {RUNS}\n")
    print("| what | measured | required |\n|---|---:|---:|")
    print(f"| `widthwise derive gated_deltanet`, cold | {cold():.2f} s | < 1.5 s |")
    shallow, deep = warm(2), warm(96)
    print(f"| describe and derive 2 layers, warm | {shallow:.0f} ms | |")
    print(f"| describe and derive 96 layers, warm | {deep:.0f} ms | the same |")


if __name__ == "__main__":
    main()
