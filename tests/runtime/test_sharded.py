"""Blocks whose weights several ranks share (FSDP2), beside one process that has all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import cogx_fast
from cogx_fast.runtime.distributed.parallel import ParallelConfig
from tests import worlds
from tests.runtime.shared_steps import make

SHARED = "tests.runtime.sharded_steps"


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    make().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.mark.parametrize("size", [2, 3])
def test_shares_of_the_weights_compute_what_whole_ones_do(size: int, checkpoint: str, tmp_path: Path) -> None:
    backend = "aot_eager" if size == 2 else "eager"
    for found in worlds.results(
        f"{SHARED}:meshes", size, tmp_path, seconds=280, backend=backend, checkpoint=checkpoint
    ):
        assert max(each["error"] for each in found) <= 1e-6
        for each in found[:-1]:
            assert each["made"] == (0, 0, 0)
            assert each["held"] == pytest.approx(1, abs=0.01)  # a share of each; some are padded
            assert each["sent"] == pytest.approx(1, abs=0.01)
        assert len(found) == 5


@pytest.mark.slow
def test_code_of_inductor_computes_it_too(checkpoint: str, tmp_path: Path) -> None:
    for found in worlds.results(
        f"{SHARED}:meshes", 2, tmp_path, seconds=900, backend="inductor", checkpoint=checkpoint
    ):
        assert max(each["error"] for each in found) <= 1e-6
        assert [each["made"] for each in found[:-1]] == [(0, 0, 0)] * 4


def test_what_goes_with_sharded_weights(checkpoint: str, tmp_path: Path) -> None:
    width, lora = make().config.inner_dim, str(tmp_path / "style.safetensors")
    halves = {"lora_A": torch.randn(2, width), "lora_B": torch.randn(width, 2)}
    names = {f"transformer.transformer_blocks.1.attn1.to_q.{half}.weight": each for half, each in halves.items()}
    save_file(names, lora)
    for errors in worlds.results(f"{SHARED}:compositions", 2, tmp_path, seconds=280, checkpoint=checkpoint, lora=lora):
        assert {name: error for name, error in errors.items() if not error <= 1e-6} == {}


def test_what_does_not_go_with_sharded_weights_says_so(checkpoint: str, tmp_path: Path) -> None:
    quantized = str(tmp_path / "quantized")
    cogx_fast.load(make(), quant="int8-weight-only").save_pretrained(quantized)
    arguments = {"checkpoint": checkpoint, "quantized": quantized, "target": str(tmp_path / "saved")}
    for said in worlds.results(f"{SHARED}:refusals", 2, tmp_path, seconds=280, **arguments):
        for expected, message in said.items():
            assert expected in message


def test_sharded_weights_are_refused_where_nothing_shares_them(checkpoint: str) -> None:
    with pytest.raises(ValueError, match="start it with torchrun"):
        cogx_fast.load(checkpoint, parallel=ParallelConfig(shard_weights=True))
