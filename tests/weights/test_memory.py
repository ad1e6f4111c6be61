"""Peak resident memory of a load, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cogx_fast
from tests.support import small
from tests.weights.support import save_upstream

SHARD = 60_000_000
SCRIPT = """
import json, re, sys
import torch
import cogx_fast

def memory(field):
    return int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

cogx_fast.runtime.upstream.model_class()  # imports diffusers
before = memory("VmRSS")
model = cogx_fast.load(sys.argv[1], dtype=sys.argv[2] or None)
for tensor in model.state_dict().values():
    tensor.view(torch.int64).sum()
size = sum(tensor.nbytes for tensor in model.state_dict().values())
print(json.dumps({"size": size, "peak": memory("VmHWM") - before}))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("large")
    config = small("5b", num_attention_heads=16, num_layers=6, time_embed_dim=512)
    save_upstream(config, directory, max_shard_size=SHARD)
    return directory


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("dtype", ["", "bf16"])
def test_peak_is_the_weights_and_little_more(dtype, checkpoint):
    root = str(Path(cogx_fast.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, checkpoint, dtype],
        env=os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["size"] > (3e8 if not dtype else 1.5e8)
    allowed = 1.1 * found["size"] + SHARD
    assert found["peak"] <= allowed, f"peak {found['peak'] / 1e6:.0f} MB for {found['size'] / 1e6:.0f} MB of weights"
    print(f"peak {found['peak'] / 1e6:.0f} MB, weights {found['size'] / 1e6:.0f} MB ({dtype or 'as stored'})")


def test_nothing_is_allocated_before_the_checks_have_passed(checkpoint, monkeypatch):
    from cogx_fast.weights import checkpoint as module
    from cogx_fast.weights.errors import CheckpointError

    def never(*_, **__):
        raise AssertionError

    monkeypatch.setattr(torch, "empty", never)
    monkeypatch.setattr(module, "Maps", never)
    with pytest.raises(CheckpointError, match="num_layers=42"):
        cogx_fast.load(checkpoint, config="5b")
