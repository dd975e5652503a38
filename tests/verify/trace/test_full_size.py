"""Published sizes, on the meta device: each in under a minute (of one processor, all it uses) and 8 GiB.

The wall-clock times of an idle machine: docs/results/tracing.md.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import full_size_models

SCRIPT = """
import json, resource, sys, time
sys.path.insert(0, sys.argv[1])
import full_size_models as models
from widthwise.derive import derive
from widthwise.verify.trace import trace
name, width = sys.argv[2], models.WIDTHS[sys.argv[2]]
rules = derive(trace(getattr(models, name), (width, 2 * width, 3 * width)).graph).rules
print(json.dumps([time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, len(rules)]))
"""


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("mlp", "cnn") else pytest.param(name, marks=pytest.mark.slow)
        for name in full_size_models.WIDTHS
    ],
)
def test_published_sizes(name: str) -> None:
    place = str(Path(__file__).parent)
    words = [sys.executable, "-c", SCRIPT, place, name]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    seconds, gigabytes, rules = json.loads(done.stdout.splitlines()[-1])
    assert seconds < 60
    assert gigabytes < 8
    assert rules >= (5 if name in ("mlp", "cnn") else 13)
