"""Peak resident memory of a load, in a process of its own for each, forked after all imports."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cogx_fast
from tests import worlds
from tests.support import small
from tests.weights.support import save_upstream

SHARD = 60_000_000
SCRIPT = """
import json, os, re, sys
import torch
import cogx_fast

def memory(field):
    return int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

cogx_fast.runtime.for_diffusers.upstream.model_class()  # imports diffusers
for number in range(1, len(sys.argv), 3):
    directory, dtype, quantized = sys.argv[number : number + 3]
    if os.fork() == 0:
        break
    assert os.wait()[1] == 0
else:
    sys.exit()
if quantized:
    import torchao.prototype.safetensors.safetensors_support, quant.apply

    torchao.quantization.quantize_(torch.nn.Linear(8, 8), torchao.quantization.Int8WeightOnlyConfig())
before = memory("VmRSS")
model = cogx_fast.load(directory, dtype=dtype or None)
tensors = list(model.state_dict().values())
if quantized:
    from cogx_fast.weights.quantized import inner_tensors, is_quantized

    tensors = [part for t in tensors for part in (inner_tensors(t) if is_quantized(t) else [t])]
for tensor in tensors:
    tensor.view(-1).view(torch.uint8).max()
size = sum(tensor.nbytes for tensor in tensors)
print(json.dumps({"size": size, "peak": memory("VmHWM") - before}), flush=True)
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


@pytest.fixture(scope="module")
def measured(checkpoint, quantized):
    """Peak of resident memory over what it was, and size of the weights, of a load as stored, in bf16 and of int8."""
    loads = {"": (checkpoint, "", ""), "bf16": (checkpoint, "bf16", ""), "int8": (quantized, "", "int8")}
    root = str(Path(cogx_fast.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, *(argument for load in loads.values() for argument in load)],
        env=os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    found = dict(zip(loads, map(json.loads, done.stdout.splitlines()), strict=True))
    print({name: {key: round(value / 1e6) for key, value in each.items()} for name, each in found.items()})
    return found


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("dtype", ["", "bf16"])
def test_peak_is_the_weights_and_little_more(dtype, measured):
    found = measured[dtype]
    assert found["size"] > (3e8 if not dtype else 1.5e8)
    assert found["peak"] <= 1.1 * found["size"] + SHARD


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_peak_of_quantized_weights_is_theirs_and_little_more(measured):
    """Never the weights that they were made of, which are twice as large."""
    found = measured["int8"]
    assert 1e8 < found["size"] < 1.25e8
    assert found["peak"] <= 1.1 * found["size"] + 15e6


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="what is shared is read from Linux's /proc")
def test_ranks_that_load_the_same_files_share_all_but_what_is_stored_in_pieces(checkpoint, tmp_path):
    """Queries, keys and values, and every layer's modulation, are one tensor here and several in diffusers' files."""
    model = cogx_fast.load(checkpoint)
    model.save_pretrained(tmp_path / "ours")
    sizes = {name: tensor.nbytes for name, tensor in model.named_parameters()}
    joined = sum(size for name, size in sizes.items() if "to_qkv" in name or name.startswith("modulation."))
    total = sum(sizes.values())
    assert 0.4 * total < joined < 0.6 * total
    del model
    copied = {str(checkpoint): joined, str(tmp_path / "ours"): 0}
    of_ranks = worlds.results(
        "tests.runtime.shared_steps:memory", 4, tmp_path, seconds=280, weights=list(copied), ranks=(2, 4)
    )
    for (directory, least), sharing in itertools.product(copied.items(), (2, 4)):
        found = [each[directory, sharing] for each in of_ranks if (directory, sharing) in each]
        assert len(found) == sharing
        assert all(abs(each["own"] - least) < 0.1 * total for each in found), found
        assert abs(sum(each["file"] for each in found) - (total - least)) < 0.1 * total, found


def test_nothing_is_allocated_before_the_checks_have_passed(checkpoint, monkeypatch):
    from cogx_fast.weights import checkpoint as module
    from cogx_fast.weights.errors import CheckpointError

    def never(*_, **__):
        raise AssertionError

    monkeypatch.setattr(torch, "empty", never)
    monkeypatch.setattr(module, "Maps", never)
    with pytest.raises(CheckpointError, match="num_layers=42"):
        cogx_fast.load(checkpoint, config="5b")
