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
if sys.argv[3]:
    import torchao.prototype.safetensors.safetensors_support, quant.apply

    torchao.quantization.quantize_(torch.nn.Linear(8, 8), torchao.quantization.Int8WeightOnlyConfig())
before = memory("VmRSS")
model = cogx_fast.load(sys.argv[1], dtype=sys.argv[2] or None)
tensors = list(model.state_dict().values())
if sys.argv[3]:
    from cogx_fast.weights.quantized import inner_tensors, is_quantized

    tensors = [part for t in tensors for part in (inner_tensors(t) if is_quantized(t) else [t])]
for tensor in tensors:
    tensor.view(-1).view(torch.uint8).max()
size = sum(tensor.nbytes for tensor in tensors)
print(json.dumps({"size": size, "peak": memory("VmHWM") - before}))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("large")
    config = small("5b", num_attention_heads=16, num_layers=6, time_embed_dim=512)
    save_upstream(config, directory, max_shard_size=SHARD)
    return directory


@pytest.fixture(scope="module")
def quantized(checkpoint, tmp_path_factory):
    """The same, as int8 with scales."""
    import quant

    directory = tmp_path_factory.mktemp("quantized")
    model = cogx_fast.load(checkpoint, dtype="bf16")
    quant.quantize(model, "int8-weight-only")
    model.save_pretrained(directory, max_shard_size=SHARD)
    return directory


def measured(directory: Path, dtype: str, quantized: str) -> dict[str, int]:
    """Peak of resident memory over what it was, and size of the weights, of one load in a process of its own."""
    root = str(Path(cogx_fast.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, directory, dtype, quantized],
        env=os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"peak {found['peak'] / 1e6:.0f} MB, weights {found['size'] / 1e6:.0f} MB ({quantized or dtype or 'stored'})")
    return found


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("dtype", ["", "bf16"])
def test_peak_is_the_weights_and_little_more(dtype, checkpoint):
    found = measured(checkpoint, dtype, "")
    assert found["size"] > (3e8 if not dtype else 1.5e8)
    assert found["peak"] <= 1.1 * found["size"] + SHARD


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_peak_of_quantized_weights_is_theirs_and_little_more(quantized):
    """Never the weights that they were made of, which are twice as large."""
    found = measured(quantized, "", "int8")
    assert 1e8 < found["size"] < 1.25e8
    assert found["peak"] <= 1.1 * found["size"] + 15e6


def test_nothing_is_allocated_before_the_checks_have_passed(checkpoint, monkeypatch):
    from cogx_fast.weights import checkpoint as module
    from cogx_fast.weights.errors import CheckpointError

    def never(*_, **__):
        raise AssertionError

    monkeypatch.setattr(torch, "empty", never)
    monkeypatch.setattr(module, "Maps", never)
    with pytest.raises(CheckpointError, match="num_layers=42"):
        cogx_fast.load(checkpoint, config="5b")
