"""What is no plain checkpoint is said to be what it is; names that programs put prefixes before are read without."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import cogx_fast
from cogx_fast.weights.errors import CheckpointError
from tests.cases import for_each
from tests.support import small, upstream
from tests.weights.support import assert_same_bits, diffusers_view, small_state

CONFIG = small("5b")
BLOCK = "transformer_blocks.0."


def written(tmp_path: Path, tensors: dict[str, Tensor]) -> Path:
    path = tmp_path / "weights.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


@for_each(
    "prefix",
    [
        "_orig_mod.",
        "module.",
        "transformer.",
        "model.",
        "model.diffusion_model.",
        "module._orig_mod.",
        "net.",
        "state_dict.ema.",
    ],
)
def test_a_prefix_of_all_names_is_read_over(prefix: str, tmp_path: Path) -> None:
    state = small_state()
    path = written(tmp_path, {f"{prefix}{name}": tensor for name, tensor in state.items()})
    assert_same_bits(diffusers_view(cogx_fast.load(path, config=CONFIG)), state)


def test_wrapped_blocks_are_read_over(tmp_path: Path) -> None:
    state = small_state()
    names = {name: name.replace(BLOCK, f"{BLOCK}_orig_mod.") for name in state}
    path = written(tmp_path, {names[name]: tensor for name, tensor in state.items()})
    assert_same_bits(diffusers_view(cogx_fast.load(path, config=CONFIG)), state)


def test_what_does_not_fit_without_its_prefix_is_told_by_its_bare_names(tmp_path: Path) -> None:
    state = {f"module.{name}": tensor for name, tensor in small_state().items() if "proj_out" not in name}
    with pytest.raises(CheckpointError, match=r"'module\.\S+' read as '\S+'.*2 are missing: proj_out\.weight"):
        cogx_fast.load(written(tmp_path, state), config=CONFIG)


def test_a_file_of_several_models_is_told(tmp_path: Path) -> None:
    state = {f"transformer.{name}": tensor for name, tensor in small_state().items()}
    with pytest.raises(CheckpointError, match=r"more than a transformer.*'transformer\.'.*vae\.weight"):
        cogx_fast.load(written(tmp_path, state | {"vae.weight": torch.zeros(1)}), config=CONFIG)


LIBRARIES = {
    "bitsandbytes": {"attn1.to_q.weight.absmax": torch.float32, "attn1.to_q.weight.quant_map": torch.float32},
    "quanto": {"attn1.to_q.weight._data": torch.int8, "attn1.to_q.weight._scale": torch.float32},
    "GPTQ or AWQ": {"attn1.to_q.qweight": torch.int32, "attn1.to_q.qzeros": torch.int32},
    r"ComfyUI \(scaled fp8\)": {"attn1.to_q.scale_weight": torch.float32},
    "compressed-tensors or ModelOpt": {"attn1.to_q.weight_scale": torch.float32},
    "layout of CogVideoX's original code": {"attention.query_key_value.weight": torch.float32},
}


@for_each("prefix", ["", "model.diffusion_model."], "library", LIBRARIES)
def test_weights_of_other_libraries_are_named(library: str, prefix: str, tmp_path: Path) -> None:
    state = small_state() | {f"{BLOCK}{n}": torch.ones(2).to(dtype) for n, dtype in LIBRARIES[library].items()}
    path = written(tmp_path, {f"{prefix}{name}": tensor for name, tensor in state.items()})
    with pytest.raises(CheckpointError, match=library):
        cogx_fast.load(path, config=CONFIG)


def test_gguf_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for source in (tmp_path / "model.gguf", tmp_path):
        with pytest.raises(CheckpointError, match="a GGUF file"):
            cogx_fast.load(source, config=CONFIG)


@pytest.fixture
def one_process() -> Iterator[None]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(os.name != "posix", reason="gloo over TCP")
def test_sharded_and_wrapped_models_are_named(one_process: None) -> None:
    from torch.distributed.fsdp import fully_shard

    model: Any = upstream(CONFIG)
    with pytest.raises(CheckpointError, match=r"wrapped by DistributedDataParallel: pass its \.module"):
        cogx_fast.load(nn.parallel.DistributedDataParallel(model))
    fully_shard(model, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (1,)))
    with pytest.raises(CheckpointError, match=r"sharded over several processes \(DTensor"):
        cogx_fast.load(model)
