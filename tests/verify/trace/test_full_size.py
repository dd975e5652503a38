"""Published sizes, on the meta device: each in under a minute (of one processor, all it uses) and 8 GiB."""

import json
import subprocess
import sys

import pytest

SCRIPT = """
import sys, time, resource, json
sys.modules["fla"] = None
import torch, transformers
torch.set_num_threads(2)
tokens = (torch.zeros(2, 8, dtype=torch.long),)

def llama(n):  # Llama 2 7B at 4096
    sizes = dict(intermediate_size=n * 11008 // 4096, num_attention_heads=n // 128, num_key_value_heads=n // 128)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(hidden_size=n, use_cache=False, **sizes)), tokens

def qwen3(n):  # Qwen3 8B at 4096
    sizes = dict(intermediate_size=3 * n, num_attention_heads=n // 128, num_key_value_heads=n // 512, head_dim=128)
    config = transformers.Qwen3Config(hidden_size=n, num_hidden_layers=36, use_cache=False, **sizes)
    return transformers.Qwen3ForCausalLM(config), tokens

def mamba2(n):  # the configuration's own sizes at 4096
    config = transformers.Mamba2Config(hidden_size=n, num_heads=n // 32, use_cache=False)
    return transformers.Mamba2ForCausalLM(config), tokens

def qwen3_next(n):  # Qwen3-Next 80B-A3B at 2048
    sizes = dict(num_attention_heads=n // 128, num_key_value_heads=n // 1024, linear_num_key_heads=n // 128)
    sizes |= dict(linear_num_value_heads=n // 64, moe_intermediate_size=n // 4, shared_expert_intermediate_size=n // 4)
    config = transformers.Qwen3NextConfig(hidden_size=n, use_cache=False, **sizes)
    return transformers.Qwen3NextForCausalLM(config), tokens

from widthwise.derive import derive
from widthwise.verify.trace import trace
name, width = sys.argv[1], int(sys.argv[2])
graph = trace(globals()[name], (width, 2 * width, 3 * width)).graph
rules = derive(graph).rules
seconds = time.process_time()  # with imports; on a machine of its own, wall-clock time is no longer
print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, len(rules)]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "width"), [("llama", 4096), ("qwen3", 4096), ("mamba2", 4096), ("qwen3_next", 2048)])
def test_published_sizes(name: str, width: int) -> None:
    pytest.importorskip("transformers")
    done = subprocess.run([sys.executable, "-c", SCRIPT, name, str(width)], capture_output=True, text=True, check=True)
    seconds, gigabytes, rules = json.loads(done.stdout.splitlines()[-1])
    assert seconds < 60
    assert gigabytes < 8
    assert rules >= 13
