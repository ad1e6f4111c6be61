"""What failed, or was other than said, when the package first met CUDA: on the stand-in device, a case for each."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

import quant
from benchmarks.standin import journal
from cogx_fast.config import PRESETS
from cogx_fast.runtime.compile import CompileConfig, compile_model
from cogx_fast.runtime.module import CogVideoXModel
from cogx_fast.runtime.watch import watch_compilation
from tests.cuda_standin.device import call, model
from tests.support import inputs

GIB = 1024**3


def full_width(preset: str = "5b", *, attention: str = "sdpa", dtype: torch.dtype = torch.bfloat16) -> CogVideoXModel:
    """A released model with one layer, its values unset."""
    with torch.device("meta"):
        made = CogVideoXModel(dataclasses.replace(PRESETS[preset], num_layers=1), attention=attention)
    return made.to(dtype).to_empty(device="cuda").eval().requires_grad_(False)


# -- attention ---------------------------------------------------------------------------------------------------------


@pytest.mark.cards("h100", "a100", "rtx4090", "b200")
@pytest.mark.parametrize("attention", ["sdpa", "sdpa-cudnn", "sdpa-flash"])
def test_every_batch_is_one_graph(attention: str) -> None:
    compiled = model(attention=attention, compile=CompileConfig(mode="default", strict=True))
    with watch_compilation() as stats:
        for batch in (2, 1, 4):
            call(compiled, batch=batch)
    assert (stats.graphs, stats.breaks, stats.recompiles) == (1, 0, 0)


@pytest.mark.cards("h100", "a100")
@pytest.mark.parametrize("compile", [False, CompileConfig(mode="default")], ids=["eager", "compiled"])
def test_sdpa_takes_the_kernel_that_torch_takes(compile: Any) -> None:
    found = call(model(compile=compile, attention="sdpa"))
    is_hopper = torch.cuda.get_device_capability() == (9, 0)
    assert bool(found.count("cudnn")) == is_hopper
    assert bool(found.count("flash_fwd")) != is_hopper


def test_masked_attention_is_trained_without_cudnn() -> None:
    trained = model(attention="sdpa").train()
    arguments = inputs(trained.config, dtype=trained.dtype, device="cuda")
    journal.clear()
    trained(**arguments, attention_kwargs={"attention_mask": torch.ones(2, 128, dtype=torch.bool, device="cuda")})
    found = journal.read()
    assert found.count("fmha_cutlassF") == trained.config.num_layers
    assert not found.count("cudnn")


# -- quantization ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["fp8-dynamic", "int8-dynamic", "int4-weight-only"])
def test_weights_of_real_sizes_are_quantized_in_few_launches(recipe: str) -> None:
    whole = full_width()
    journal.clear()
    report = quant.quantize(whole, recipe)
    assert all(linear.bytes_after < linear.bytes_before for linear in report.linears if linear.scheme)
    assert journal.launches() < 250  # in pieces of a million values: 2,240
    quantized = [module for module in whole.modules() if isinstance(module, nn.Linear)]
    assert sum(hasattr(linear.weight, "__tensor_flatten__") for linear in quantized) == 4
