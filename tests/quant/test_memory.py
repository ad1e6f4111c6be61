"""Peak resident memory of loading quantized, in a process of its own for each recipe, forked after all imports.

There glibc is told to give every freed tensor back at once. Left alone it raises that limit to 32 MB as tensors are
freed and keeps what is smaller for later, which is a property of the toy sizes here as much as of the code.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import cogx_fast
from tests.cases import for_each
from tests.support import small, upstream

SCRIPT = """
import json, os, re, sys
import torch
import cogx_fast, quant

def memory(field):
    return int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

cogx_fast.load("tiny", quant="int8-weight-only")  # imports all there is
for recipe in sys.argv[2:]:
    if os.fork() == 0:
        break
    assert os.wait()[1] == 0
else:
    sys.exit()
cogx_fast.load("tiny", quant=recipe)
before = memory("VmRSS")
model = cogx_fast.load(sys.argv[1], quant=recipe)

def size(tensor):
    parts = [getattr(tensor, n) for n in tensor.__tensor_flatten__()[0]] if hasattr(tensor, "qdata") else [tensor]
    return sum(part.nbytes for part in parts)

total = sum(map(size, model.state_dict().values()))
full = sum(tensor.numel() * 2 for tensor in model.state_dict().values())
block = sum(tensor.numel() * 2 for tensor in model.transformer_blocks[0].state_dict().values())
print(json.dumps({"size": total, "full": full, "block": block, "peak": memory("VmHWM") - before}), flush=True)
"""
RECIPES = ("int8-weight-only", "fp8-weight-only", "int8-dynamic")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What each recipe's process says."""
    directory = tmp_path_factory.mktemp("large")
    config = small("5b", num_attention_heads=16, num_layers=8, time_embed_dim=64)
    upstream(config).bfloat16().save_pretrained(directory, max_shard_size="50MB")
    root = str(Path(cogx_fast.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, directory, *RECIPES],
        env=os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "500000"},
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return dict(zip(RECIPES, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
@for_each("name", RECIPES)
def test_peak_is_the_quantized_weights_and_about_a_block(name, measured):
    found = measured[name]
    print({key: round(value / 1e6) for key, value in found.items()})
    assert found["size"] < 0.6 * found["full"]
    assert found["peak"] <= 1.02 * found["size"] + 1.5 * found["block"], found
