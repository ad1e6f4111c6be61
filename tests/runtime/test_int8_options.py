"""Compiled for CUDA, an int8-dynamic model has Inductor options of its own; no other has them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from cogx_fast.model.products import is_int8_dynamic
from cogx_fast.runtime.compiling import compile
from cogx_fast.runtime.compiling.compile import INT8_OPTIONS, CompileConfig, inductor_options
from quant import quantize
from tests.cases import for_each
from tests.support import small


def _options(scheme: str | None, device: str, **config: Any) -> dict[str, Any]:
    linear = nn.Linear(64, 64).bfloat16()
    if scheme is not None:
        from torchao.quantization import quantize_

        from quant.schemes import torchao_config

        quantize_(linear, torchao_config(scheme), filter_fn=lambda *_: True)
    return inductor_options(CompileConfig(**config), torch.device(device), int8=is_int8_dynamic(linear))


@for_each(
    "scheme, device, mode, wanted",
    [
        ("int8-dynamic", "cuda", None, True),
        ("int8-dynamic", "cuda", "max-autotune-no-cudagraphs", True),
        ("int8-dynamic", "cuda", "default", False),
        ("int8-dynamic", "cpu", None, False),
        ("int8-weight-only", "cuda", None, False),
        ("fp8-dynamic-emulated", "cuda", None, False),
        (None, "cuda", None, False),
    ],
)
def test_who_has_them(scheme: str | None, device: str, mode: str | None, wanted: bool) -> None:
    options = _options(scheme, device, mode=mode)
    assert {name: options.get(name) for name in INT8_OPTIONS} == (
        INT8_OPTIONS if wanted else dict.fromkeys(INT8_OPTIONS)
    )


@for_each("recipe", [None, "int8-dynamic", "int8-weight-only"])
def test_the_models_own_linears_decide(monkeypatch: pytest.MonkeyPatch, recipe: str | None) -> None:
    from cogx_fast.runtime.module import CogVideoXModel

    model, seen = CogVideoXModel(small("5b", num_layers=1)).bfloat16(), []
    if recipe is not None:
        quantize(model, recipe)
    monkeypatch.setattr(
        compile,
        "inductor_options",
        lambda config, device, *, int8: seen.append(int8) or inductor_options(config, device),
    )
    compile.compile_model(model, CompileConfig())
    assert set(seen) == {recipe == "int8-dynamic"}


def test_options_of_the_caller_come_last() -> None:
    assert not _options("int8-dynamic", "cuda", options={"epilogue_fusion_first": False})["epilogue_fusion_first"]
