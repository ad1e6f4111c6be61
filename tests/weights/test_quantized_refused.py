"""Quantized checkpoints that are damaged, foreign or of another torchao are refused with what is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import cogx_fast
from quant import storage
from tests.quant.support import checksum
from tests.weights.quantized import quantized, refused
from tests.weights.support import WEIGHTS, assert_same_model, from_upstream


def test_dtype(int8):
    model = int8[0]
    for source in int8:
        refused(r"dtype=torch.float32.*quantized from torch.bfloat16", source, dtype="fp32")
        assert_same_model(cogx_fast.load(source, dtype="bf16"), model)


@pytest.mark.parametrize("recipe", ["int8-weight-only", "fp8-weight-only"])
def test_check_finite(recipe, tmp_path):
    model = quantized(recipe)
    model.save_pretrained(tmp_path)
    cogx_fast.load(tmp_path, check_finite=True)
    model.transformer_blocks[1].ff.net[2].weight.scale[3] = float("nan")
    refused(r"infinite or NaN weights: transformer_blocks.1.ff.net.2.weight", model, check_finite=True)
    model.save_pretrained(tmp_path)
    cogx_fast.load(tmp_path)
    refused(r"infinite or NaN weights: transformer_blocks.1.ff.net.2.weight", tmp_path, check_finite=True)


def rewrite(directory: Path, change: Any) -> None:
    """Change tensors and metadata of a file, with a checksum that fits."""
    from safetensors.torch import load_file, save_file

    with safe_open(directory / WEIGHTS, "pt") as file:
        metadata = {key: text for key, text in file.metadata().items() if key not in ("format", "quant.sha256")}
    tensors = load_file(directory / WEIGHTS)
    change(tensors, metadata)
    save_file(tensors, directory / WEIGHTS, metadata | {"quant.sha256": checksum(metadata), "format": "pt"})


@pytest.fixture
def changed(int8, tmp_path):
    def change(how: Any) -> Path:
        directory = shutil.copytree(int8[1], tmp_path / "changed")
        rewrite(directory, how)
        return directory

    return change


def test_another_torchao(changed, int8):
    def older(tensors: dict, metadata: dict) -> None:
        metadata["quant.torchao"] = "0.15.0"
        for name in json.loads(metadata["tensor_names"]):
            metadata[name] = metadata[name].replace('"reduce_range": false, ', "")

    def newer(tensors: dict, metadata: dict) -> None:
        metadata["quant.torchao"] = "9.1.0"
        for name in json.loads(metadata["tensor_names"]):
            metadata[name] = metadata[name].replace('"block_size"', '"block_shape"')

    directory = changed(older)
    assert_same_model(cogx_fast.load(directory), int8[0])
    rewrite(directory, newer)
    refused(rf"{WEIGHTS}: written by torchao 9.1.0, which the installed torchao {storage.torchao_version()}", directory)


def test_a_part_is_missing(changed):
    refused("parts of quantized weights are missing.*to_k._weight_scale", changed(
        lambda tensors, _: tensors.pop("transformer_blocks.1.attn1.to_k._weight_scale")))  # fmt: skip


def test_a_weight_is_missing(changed):
    def without(tensors: dict, metadata: dict) -> None:
        for part in ("qdata", "scale", "zero_point"):
            del tensors[f"transformer_blocks.1.attn1.to_out.0._weight_{part}"]
        name = "transformer_blocks.1.attn1.to_out.0.weight"
        del metadata[name]
        metadata["tensor_names"] = json.dumps([n for n in json.loads(metadata["tensor_names"]) if n != name])

    refused("1 are missing: transformer_blocks.1.attn1.to_out.0.weight", changed(without))


def test_one_of_three_is_not_quantized(changed):
    def dequantized(tensors: dict, metadata: dict) -> None:
        name = "transformer_blocks.1.attn1.to_k"
        shape = tensors[f"{name}._weight_qdata"].shape
        for part in ("qdata", "scale", "zero_point"):
            del tensors[f"{name}._weight_{part}"]
        tensors[f"{name}.weight"] = torch.zeros(shape, dtype=torch.bfloat16)
        metadata[f"{name}.weight"] = '{"_type": "Tensor"}'

    refused("to_k.weight are not, which are one weight here", changed(dequantized))


def test_shapes_and_dtypes(changed):
    def shorter(tensors: dict, _: Any) -> None:
        name = "transformer_blocks.1.ff.net.2._weight_"
        tensors.update(
            {f"{name}{part}": tensors[f"{name}{part}"][:-1].clone() for part in ("qdata", "scale", "zero_point")}
        )

    refused(r"have another shape: transformer_blocks.1.ff.net.2.weight \(127, 512\)", changed(shorter))


def test_scales_of_another_dtype(changed):
    def integers(tensors: dict, _: Any) -> None:
        name = "transformer_blocks.1.ff.net.2._weight_scale"
        tensors[name] = tensors[name].int()

    refused("its scale is torch.int32", changed(integers))


def test_parts_quantized_apart(tmp_path):
    """One scale for all rows cannot be three."""
    model = quantized("fp8-dynamic-tensor")
    model.save_pretrained(tmp_path)
    theirs = from_upstream(tmp_path, torch_dtype=torch.bfloat16)
    theirs.transformer_blocks[0].attn1.to_k.weight.scale = torch.ones(1, 1)
    refused("a scale of its own", theirs)

    def scaled(tensors: dict, _: Any) -> None:
        tensors["transformer_blocks.0.attn1.to_k._weight_scale"] = torch.ones(1, 1)

    rewrite(tmp_path, scaled)
    refused("to_k._weight_scale.* differ", tmp_path)


def test_shards_of_two_saves(tmp_path):
    for recipe in ("fp8-weight-only", "fp8-dynamic"):
        quantized(recipe).save_pretrained(tmp_path / recipe, max_shard_size="150KB")
    shard = sorted((tmp_path / "fp8-dynamic").glob("*.safetensors"))[-1].name
    assert (tmp_path / "fp8-weight-only" / shard).exists()
    shutil.copy(tmp_path / "fp8-dynamic" / shard, tmp_path / "fp8-weight-only")
    refused("its shards are not of one save", tmp_path / "fp8-weight-only")


def test_other_libraries_weights(int8, tmp_path):
    directory = shutil.copytree(int8[1], tmp_path / "copy")
    content = json.loads((directory / "config.json").read_text())
    content["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (directory / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"'bitsandbytes', only 'torchao'"):
        cogx_fast.load(directory)
