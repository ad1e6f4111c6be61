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
from tests.cases import for_each
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


def test_another_torchao(int8, tmp_path):
    def older(tensors: dict, metadata: dict) -> None:
        metadata["quant.torchao"] = "0.15.0"
        for name in json.loads(metadata["tensor_names"]):
            metadata[name] = metadata[name].replace('"reduce_range": false, ', "")

    def newer(tensors: dict, metadata: dict) -> None:
        metadata["quant.torchao"] = "9.1.0"
        for name in json.loads(metadata["tensor_names"]):
            metadata[name] = metadata[name].replace('"block_size"', '"block_shape"')

    directory = shutil.copytree(int8[1], tmp_path / "changed")
    rewrite(directory, older)
    assert_same_model(cogx_fast.load(directory), int8[0])
    rewrite(directory, newer)
    refused(rf"{WEIGHTS}: written by torchao 9.1.0, which the installed torchao {storage.torchao_version()}", directory)


K, OUT, SECOND = (f"transformer_blocks.1.{name}" for name in ("attn1.to_k", "attn1.to_out.0", "ff.net.2"))
PARTS = [f"_weight_{part}" for part in ("qdata", "scale", "zero_point")]


def without(tensors: dict, metadata: dict) -> None:
    for part in PARTS:
        del tensors[f"{OUT}.{part}"]
    del metadata[f"{OUT}.weight"]
    left = [name for name in json.loads(metadata["tensor_names"]) if name != f"{OUT}.weight"]
    metadata["tensor_names"] = json.dumps(left)


def dequantized(tensors: dict, metadata: dict) -> None:
    tensors[f"{K}.weight"] = torch.zeros(tensors[f"{K}._weight_qdata"].shape, dtype=torch.bfloat16)
    for part in PARTS:
        del tensors[f"{K}.{part}"]
    metadata[f"{K}.weight"] = '{"_type": "Tensor"}'


def shorter(tensors: dict, _: Any) -> None:
    tensors |= {f"{SECOND}.{part}": tensors[f"{SECOND}.{part}"][:-1].clone() for part in PARTS}


def integers(tensors: dict, _: Any) -> None:
    tensors[f"{SECOND}._weight_scale"] = tensors[f"{SECOND}._weight_scale"].int()


CHANGED = {
    "no part": (
        lambda tensors, _: tensors.pop(f"{K}._weight_scale"),
        "parts of quantized weights are missing.*to_k._weight_scale",
    ),
    "no weight": (without, f"1 are missing: {OUT}.weight"),
    "one of three as it was": (dequantized, "to_k.weight are not, which are one weight here"),
    "another shape": (shorter, rf"have another shape: {SECOND}.weight \(127, 512\)"),
    "scales of another dtype": (integers, "its scale is torch.int32"),
}


@for_each("change, words", CHANGED.values(), ids=CHANGED)
def test_weights_that_are_not_whole(change: Any, words: str, int8: Any, tmp_path: Path) -> None:
    directory = shutil.copytree(int8[1], tmp_path / "changed")
    rewrite(directory, change)
    refused(words, directory)


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
