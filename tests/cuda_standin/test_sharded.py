"""Blocks that two ranks share by FSDP2, as one of the two sees them: its device, its allocator, its streams.

The other is torch's own fake process group: what would be gathered from it is not there, everything else is.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from cogx_fast.config import PRESETS
from cogx_fast.runtime.compiling.compile import compile_model
from cogx_fast.runtime.compiling.recompiles import watch_compilation
from cogx_fast.runtime.distributed.sharded import shard_blocks
from cogx_fast.runtime.module import CogVideoXModel
from tests.cuda_standin.device import FAST, peak_bytes
from tests.cuda_standin.test_memory import arguments

LAYERS = 6
MIB = 1024**2


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cuda", (2,), mesh_dim_names=("weights",))
    dist.destroy_process_group()


def made_on(device: str) -> CogVideoXModel:
    with torch.device("meta"):
        model = CogVideoXModel(dataclasses.replace(PRESETS["5b"], num_layers=LAYERS), attention="sdpa")
    return model.to(torch.bfloat16).to_empty(device=device).eval().requires_grad_(False)


@pytest.mark.cards("rtx4090", "h100")
@pytest.mark.parametrize("compile", [False, True])
def test_5b_at_full_width_holds_half_of_its_blocks_and_few_whole_ones_in_a_step(compile, mesh):
    whole = made_on("cuda")
    block = sum(tensor.nbytes for tensor in whole.transformer_blocks[0].parameters())
    rest = sum(tensor.nbytes for name, tensor in whole.state_dict().items() if "transformer_blocks" not in name)
    needs = step_peak(whole, compile)
    del whole
    gc.collect()
    before = torch.cuda.memory_allocated()
    shared = made_on("cpu")
    with peak_bytes() as peak:
        shard_blocks(shared, mesh, "")
    held = torch.cuda.memory_allocated() - before
    assert held == pytest.approx(LAYERS * block / 2, rel=0.03)  # the allocator rounds up
    assert peak[0] < held + 1.1 * block, "one block at a time is whole while they are shared out"
    shared.to("cuda")
    needs_shared = step_peak(shared, compile)
    assert torch.cuda.memory_allocated() - before < held + rest + 64 * MIB, "nothing that was gathered stays"
    assert needs_shared - needs < 3.1 * block, "one that computes, one that is gathered, and what it is gathered in"


def step_peak(model: CogVideoXModel, compile: bool) -> int:
    """Bytes that a step takes beside the weights, the second time."""
    if compile:
        compile_model(model, FAST)
    given = arguments(model.config)
    with torch.no_grad(), watch_compilation() as stats:
        model(**given, return_dict=False)
        with peak_bytes() as peak:
            model(**given, return_dict=False)
    assert (stats.breaks, stats.recompiles) == (0, 0)
    return peak[0]
