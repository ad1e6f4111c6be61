"""What one process compiled, another runs: bundles and packages, made and used on the stand-in device."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cogx_fast
from cogx_fast.loading import load_package
from cogx_fast.runtime.packages.export import export_package
from cogx_fast.runtime.packages.package import SizeRange
from tests.cuda_standin.device import FAST, FEW_CANDIDATES, attention_kernels, call, checkpoint

LAYERS = 2

_START = """
import json, sys, warnings
import torch, cogx_fast
from torch._dynamo.utils import counters
from tests.cuda_standin.device import FAST, FEW_CANDIDATES, attention_kernels, call
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    model = cogx_fast.load(sys.argv[1], device=sys.argv[3], dtype="bf16", attention="sdpa", compile=FAST,
                           compile_cache=sys.argv[2]).requires_grad_(False)
    done = call(model)
inductor = counters["inductor"]
print(json.dumps({"hits": inductor["fxgraph_cache_hit"], "misses": inductor["fxgraph_cache_miss"],
                  "aot_hits": counters["aot_autograd"]["autograd_cache_hit"],
                  "triton": dict(done.triton), "attention": dict(attention_kernels(done)),
                  "warnings": [str(w.message) for w in caught if "bundle" in str(w.message)]}))
"""


def start(tmp_path: Path, device: str) -> dict:
    """Load the checkpoint with the bundle in a new process with empty caches; what it found and ran."""
    import os

    caches = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "i"), "TRITON_CACHE_DIR": str(tmp_path / "t")}
    command = [sys.executable, "-c", _START, str(tmp_path / "model"), str(tmp_path / "b.bundle"), device]
    done = subprocess.run(command, env=os.environ | caches, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.cards("h100")
def test_a_bundle_made_here_starts_another_process_warm(tmp_path):
    checkpoint(tmp_path / "model")
    model = cogx_fast.load(tmp_path / "model", device="cuda", dtype="bf16", attention="sdpa", compile=FAST)
    done = call(model.requires_grad_(False))
    model.save_compile_cache(tmp_path / "b.bundle")
    found = start(tmp_path, "cuda")
    assert not found["warnings"]
    assert found["hits"] + found["aot_hits"] > 0
    assert found["misses"] == 0
    assert set(found["triton"]) <= set(done.triton)
    assert sum(found["attention"].values()) == LAYERS


@pytest.mark.cards("h100", "rtx4090")
@pytest.mark.parametrize(("attention", "recipe"), [("sdpa", None), ("flex", "fp8-dynamic")])
def test_a_package_runs_on_the_device_it_was_made_on(tmp_path, attention, recipe):
    checkpoint(tmp_path / "model", num_attention_heads=3)
    model = cogx_fast.load(tmp_path / "model", device="cuda", dtype=torch.bfloat16, attention=attention, quant=recipe)
    with torch._inductor.config.patch(FEW_CANDIDATES):
        export_package(model, tmp_path / "x.pt2", SizeRange(tokens=(8, 4000), batch=4))
    packaged = load_package(tmp_path / "x.pt2", tmp_path / "model", device="cuda")
    for batch in (2, 1, 4):
        done = call(packaged, batch=batch)
        assert sum(attention_kernels(done).values()) == LAYERS
        assert done.triton
    second = load_package(tmp_path / "x.pt2", tmp_path / "model", device="cuda:1")
    assert call(second).devices == {1}
    streamed = load_package(tmp_path / "x.pt2", tmp_path / "model", device="cuda", offload="blocks")
    call(streamed)
    done = call(streamed)
    (size,) = {streamed.runner.slots.residency.hold(block).memory.numel() for block in streamed.transformer_blocks}
    assert sum(line == f"to-device {size}" for line in done.of("copy")) == LAYERS
    assert sum(attention_kernels(done).values()) == LAYERS
    assert not done.of("sync")


@pytest.mark.cards("h100")
def test_a_package_is_built_with_the_headers_of_wheels(tmp_path, monkeypatch):
    for name in ("CPATH", "LIBRARY_PATH", "CUDA_HOME", "CUDA_PATH"):  # as where no toolkit is installed
        monkeypatch.delenv(name, raising=False)
    checkpoint(tmp_path / "model")
    model = cogx_fast.load(tmp_path / "model", device="cuda", dtype=torch.bfloat16, attention="sdpa")
    export_package(model, tmp_path / "x.pt2", SizeRange(tokens=(8, 4000), batch=4))
    packaged = load_package(tmp_path / "x.pt2", tmp_path / "model", device="cuda")
    assert sum(attention_kernels(call(packaged)).values()) == LAYERS
