"""Quantized checkpoints: written, read back bit for bit, read by diffusers, shared between live models, refused."""

from __future__ import annotations

import json
import pickle
import shutil
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

import cogx_fast
import quant
from cogx_fast.weights.errors import CheckpointError
from quant import storage
from tests.cases import for_each
from tests.quant.support import assert_same_weight
from tests.support import relative_error, small, upstream
from tests.weights.quantized import RECIPES, call, quantized, refused
from tests.weights.support import INDEX, WEIGHTS, assert_same_model, from_upstream

# ---------------------------------------------------------------------------------------------------------- round trip


@for_each(
    "name, recipe, shard",
    [
        *(("5b", recipe, shard) for recipe in RECIPES for shard in ("10GB", "150KB", 1)),
        *((name, "int8-weight-only", "10GB") for name in ("2b", "5b-i2v", "1.5-5b-i2v")),
    ],
)
def test_round_trip_is_bit_exact(name, recipe, shard, tmp_path):
    model = quantized(recipe, None if name == "5b" else small(name))
    assert storage.is_quantized(model.modulation.linear.weight) or recipe == "int8-dynamic"
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / INDEX).exists() == (shard != "10GB")
    restored = cogx_fast.load(tmp_path)
    assert_same_model(restored, model)
    assert torch.equal(call(restored, model.config), call(model, model.config))
    known = quant.recipe_of(model)
    assert quant.recipe_of(restored) == known
    assert (tmp_path / "recipe.toml").exists() == (known is not None)
    if known is not None:
        assert quant.load_recipe(tmp_path / "recipe.toml") == known


def test_of_a_quantized_patch_projection(tmp_path):
    """A matrix here and a convolution in diffusers, which cannot hold it."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = cogx_fast.load(upstream(small("5b")), dtype="bf16")
    quantize_(model, Int8WeightOnlyConfig(set_inductor_config=False), filter_fn=lambda _, name: name.endswith(".proj"))
    assert storage.is_quantized(model.patch_embed.proj.weight)
    model.save_pretrained(tmp_path)
    assert_same_model(cogx_fast.load(tmp_path), model)


def test_everything_is_mapped(int8, monkeypatch):
    from cogx_fast.weights import checkpoint

    read = []
    monkeypatch.setattr(checkpoint, "read", read.append)
    cogx_fast.load(int8[1])
    assert read == [[]]


def test_nothing_is_pickled(tmp_path, monkeypatch):
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("pickle")

    model = quantized("int8-weight-only")
    for owner, name in [(pickle, "dump"), (pickle, "dumps"), (pickle, "load"), (pickle, "loads"), (torch, "load"),
                        (torch, "save"), (pickle, "Pickler"), (pickle, "Unpickler")]:  # fmt: skip
        monkeypatch.setattr(owner, name, never)
    model.save_pretrained(tmp_path)
    cogx_fast.load(tmp_path)


def test_format(int8):
    model, directory = int8
    assert sorted(path.name for path in directory.iterdir()) == ["config.json", WEIGHTS, "recipe.toml"]
    with safe_open(directory / WEIGHTS, "pt") as file:
        metadata, names = file.metadata(), set(file.keys())
    assert metadata["quant.torchao"] == storage.torchao_version()
    assert quant.recipe.parse_recipe(metadata["quant.recipe"]) == quant.recipe_of(model)
    assert "transformer_blocks.0.attn1.to_q._weight_qdata" in names
    assert "transformer_blocks.0.norm1.linear._weight_scale" in names
    about = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert about["quant_method"] == "torchao"
    assert about["quant_type"]["default"]["_type"] == "Int8WeightOnlyConfig"
    assert about["quant_type"]["default"]["_data"]["set_inductor_config"] is False


def test_the_copy_of_the_recipe_comes_and_goes_with_quantized_weights(tmp_path):
    model = cogx_fast.load(upstream(small("5b")), dtype="bf16")
    quantized("int8-weight-only").save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "recipe.toml").exists()
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "recipe.toml").write_text("mine")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "recipe.toml").read_text() == "mine"
    quantized("int8-weight-only").save_pretrained(tmp_path, variant="int8")
    assert (tmp_path / "recipe.toml").read_text() == "mine"
    assert quant.load_recipe(tmp_path / "recipe.int8.toml").name == "int8-weight-only"
    assert quant.recipe_of(cogx_fast.load(tmp_path, variant="int8")).name == "int8-weight-only"
    assert quant.recipe_of(cogx_fast.load(tmp_path)) is None


def test_the_weights_know_themselves_what_they_are(int8, tmp_path):
    model, directory = int8
    shutil.copy(directory / WEIGHTS, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
    assert_same_model(cogx_fast.load(tmp_path), model)
    cogx_fast.load(upstream(small("5b"))).save_pretrained(tmp_path / "plain")
    shutil.copy(directory / "config.json", tmp_path / "plain")
    assert type(cogx_fast.load(tmp_path / "plain").proj_out.weight) is nn.Parameter


# ----------------------------------------------------------------------------------------------------------- diffusers


@for_each("shard", ["10GB", "150KB"], "recipe", RECIPES[:-1])
def test_unmodified_diffusers_reads_it(recipe, shard, tmp_path):
    model = quantized(recipe, dtype="fp32" if recipe == "int8-weight-only" else "bf16")
    model.save_pretrained(tmp_path, max_shard_size=shard)
    theirs = from_upstream(tmp_path, torch_dtype=model.dtype)
    whole = storage.flatten(model.transformer_blocks[1].attn1.to_qkv.weight)
    dim = model.config.inner_dim
    for row, name in enumerate(("to_q", "to_k", "to_v")):
        piece = whole.rows(row * dim, dim)
        weight = getattr(theirs.transformer_blocks[1].attn1, name).weight
        assert_same_weight(weight, storage.restore("to.weight", piece.parts, WRITTEN, piece.description))
    error = relative_error(call(theirs, model.config), call(model, model.config))
    assert error < (1e-5 if model.dtype == torch.float32 else 0.02)


WRITTEN = storage.Written(descriptions={}, recipe=None, torchao=None)


@pytest.mark.parametrize("shard", ["10GB", "150KB"])
def test_what_diffusers_quantized_and_saved_is_read(shard, tmp_path):
    from diffusers import TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    config = small("5b")
    cogx_fast.load(upstream(config)).save_pretrained(tmp_path / "plain")
    how = Int8WeightOnlyConfig(set_inductor_config=False)
    theirs = from_upstream(
        tmp_path / "plain",
        quantization_config=TorchAoConfig(how),
        torch_dtype=torch.bfloat16,
    )
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=shard)
    model = cogx_fast.load(tmp_path / "theirs")
    assert storage.is_quantized(model.transformer_blocks[0].attn1.to_qkv.weight)
    assert quant.recipe_of(model) is None
    assert relative_error(call(model, config), call(theirs, config)) < 0.02
    model.save_pretrained(tmp_path / "ours")
    assert_same_model(cogx_fast.load(tmp_path / "ours"), model)


# --------------------------------------------------------------------------------------------------------- live models


def test_a_live_one_is_shared():
    model = quantized("int8-dynamic")
    other = cogx_fast.load(model, attention="flex")
    assert_same_model(other, model)
    for name, tensor in model.state_dict().items():
        if storage.is_quantized(tensor):
            assert other.state_dict()[name].qdata.data_ptr() == tensor.qdata.data_ptr()
    assert quant.recipe_of(other) == quant.recipe_of(model)


@pytest.mark.parametrize("recipe", ["int8-weight-only", "fp8-dynamic-tensor"])
def test_a_live_one_of_diffusers_is_joined_and_keeps_working(recipe, tmp_path):
    model = quantized(recipe)
    model.save_pretrained(tmp_path)
    theirs = from_upstream(tmp_path, torch_dtype=torch.bfloat16)
    before = call(theirs, model.config)
    joined = cogx_fast.load(theirs)
    assert_same_model(joined, model)
    assert torch.equal(call(theirs, model.config), before)
    ours = joined.transformer_blocks[0].attn1
    upstreams = theirs.transformer_blocks[0].attn1
    assert upstreams.to_q.weight.qdata.data_ptr() == ours.to_qkv.weight.qdata.data_ptr()
    assert upstreams.to_out[0].weight.qdata.data_ptr() == ours.to_out[0].weight.qdata.data_ptr()


def test_a_pipeline_keeps_its_quantized_transformer(tmp_path):
    from diffusers import CogVideoXPipeline

    from cogx_fast.assets import tiny_pipeline_dir

    model = cogx_fast.load("tiny", dtype="bf16")
    quant.quantize(model, "int8-weight-only")
    pipe = CogVideoXPipeline.from_pretrained(tiny_pipeline_dir(), transformer=model)
    pipe.save_pretrained(tmp_path)
    restored = cogx_fast.load(tmp_path)
    assert_same_model(restored, model)
    assert quant.recipe_of(restored) == quant.recipe_of(model)
    theirs = CogVideoXPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert storage.is_quantized(theirs.transformer.transformer_blocks[0].attn1.to_q.weight)
    assert_same_model(cogx_fast.accelerate(theirs).transformer, model)


# --------------------------------------------------------------------------------------------------------------- quant=


def test_quant_of_what_is_quantized_already_is_its_own_or_refused(int8, tmp_path):
    for source in int8:
        assert_same_model(cogx_fast.load(source, quant="int8-weight-only"), int8[0])
        refused(
            "is quantized already, with 'int8-weight-only', and quant asks for 'int8-dynamic'",
            source,
            quant="int8-dynamic",
        )
    theirs = from_upstream(int8[1], torch_dtype=torch.bfloat16)  # knows no recipe
    refused("with an unknown recipe", theirs, quant="int8-weight-only")


def test_a_restored_dynamic_recipe_warns_as_a_new_one_does(tmp_path):
    quantized("int8-dynamic").save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="'int8-dynamic' quantizes activations"):
        cogx_fast.load(tmp_path)


def test_emulations_are_not_stored(tmp_path):
    model = cogx_fast.load(upstream(small("5b")), dtype="bf16")
    quant.quantize(model, "fp8-dynamic-emulated")
    with pytest.raises(CheckpointError, match="no safetensors format"):
        model.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []
    cogx_fast.load(model, check_finite=True)


def test_info_counts_parameters_not_what_they_are_stored_as(int8):
    from cogx_fast.pipelines.locate import locate, read_stored_weights

    model, directory = int8
    stored = read_stored_weights(locate(str(directory)))
    assert stored is not None
    assert stored.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert next(iter(stored.dtypes)) == "I8"
    assert stored.bytes < 1.3 * stored.parameters
