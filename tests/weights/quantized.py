"""Small quantized models for tests, by recipe."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import cogx_fast
import quant
from cogx_fast.weights.errors import CheckpointError
from tests.quant.support import without_onednn
from tests.support import inputs, pipeline_rotary, small, upstream

RECIPES = ["int8-weight-only", "int8-dynamic", "fp8-weight-only", "fp8-dynamic", "fp8-dynamic-tensor", "int4-unpacked"]
LINEARS = ("to_qkv", "to_out.0", "net.0.proj", "net.2", "modulation.linear")


def quantized(recipe: str, config: Any = None, dtype: str = "bf16") -> Any:
    """A small model, quantized; where the recipe needs a GPU, by making torchao's tensors by hand."""
    # A matrix of 128 × 128 with one scale is one of blocks of 128 × 128 to torchao, which then fails: three heads.
    config = config or small("5b", num_attention_heads=3 if recipe == "fp8-dynamic-tensor" else 2)
    model = cogx_fast.load(upstream(config), dtype=dtype)
    if recipe in quant.recipe_names() and not recipe.startswith("fp8-dynamic"):
        quant.quantize(model, recipe)
        return model
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(LINEARS):
            module.weight = nn.Parameter(by_hand(recipe, module.weight), requires_grad=False)
    if recipe in quant.recipe_names():
        from quant.apply import remember

        remember(model, quant.load_recipe(recipe))
    return model


def by_hand(recipe: str, weight: torch.Tensor) -> torch.Tensor:
    from torchao.float8.inference import Float8MMConfig
    from torchao.quantization import Float8Tensor, IntxUnpackedToInt8Tensor, PerRow, PerTensor
    from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

    if recipe == "int4-unpacked":
        return IntxUnpackedToInt8Tensor.from_hp(weight.detach(), block_size=[1, 16], target_dtype=torch.int4)
    granularity = PerTensor() if recipe.endswith("tensor") else PerRow()
    fast = Float8MMConfig(use_fast_accum=True)
    activation = QuantizeTensorToFloat8Kwargs(granularity=granularity, mm_config=fast, hp_value_lb=1e-12)
    return Float8Tensor.from_hp(weight.detach(), granularity=granularity, mm_config=fast, act_quant_kwargs=activation)


def call(model: Any, config: Any) -> torch.Tensor:
    arguments = inputs(config, dtype=model.proj_out.weight.dtype)
    arguments["image_rotary_emb"] = pipeline_rotary(config, arguments["hidden_states"])
    with torch.no_grad(), without_onednn():
        return model(**arguments, return_dict=False)[0]


def refused(words: str, source: Any, **options: Any) -> None:
    with pytest.raises(CheckpointError, match=words):
        cogx_fast.load(source, **options)
