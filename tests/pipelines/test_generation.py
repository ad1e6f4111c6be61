from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from cogx_fast.config import PRESETS
from cogx_fast.model import cpu
from cogx_fast.pipelines import generation
from cogx_fast.pipelines.generation import (
    Request,
    Run,
    Setting,
    dtype_warning,
    median_step,
    open_pipeline,
    overflow_warning,
    run_pipeline,
)
from cogx_fast.pipelines.locate import locate_pipeline
from cogx_fast.sizes import VideoSize
from tests.cases import for_each

REQUEST = Request(prompt="a seven", size=VideoSize(frames=1, height=64, width=64), steps=2)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return open_pipeline(locate_pipeline("tiny"), Setting(), device=torch.device("cpu"))


@pytest.fixture(scope="module")
def first(pipe: Any) -> Run:
    return run_pipeline(pipe, REQUEST)


def test_a_run_and_its_times(first: Run) -> None:
    assert first.frames is not None
    assert (first.frames.shape, first.frames.dtype) == ((1, 64, 64, 3), np.float32)
    assert len(first.steps) == 1
    assert 0 < first.first_step + first.steps[0] < first.total


def test_the_same_request_gives_the_same_video(pipe: Any, first: Run) -> None:
    assert np.array_equal(run_pipeline(pipe, REQUEST).frames, first.frames)


@for_each("change", [{"seed": 1}, {"guidance": 1.0}, {"negative_prompt": "a six"}, {"steps": 3}, {"prompt": "a six"}])
def test_everything_in_a_request_counts(pipe: Any, first: Run, change: dict[str, Any]) -> None:
    assert not np.array_equal(run_pipeline(pipe, dataclasses.replace(REQUEST, **change)).frames, first.frames)


def test_latents_alone_and_every_step_is_reported(pipe: Any) -> None:
    done: list[int] = []
    run = run_pipeline(pipe, dataclasses.replace(REQUEST, steps=3), decode=False, on_step=done.append)
    assert run.frames is None
    assert done == [1, 2, 3]


@for_each("name", PRESETS)
def test_fp16_is_warned_of_where_it_overflows(name: str) -> None:
    warning = overflow_warning(PRESETS[name], torch.float16)
    assert (warning is not None) == (name not in ("2b", "tiny"))
    assert overflow_warning(PRESETS[name], torch.bfloat16) is None
    assert overflow_warning(PRESETS[name], None) is None


def test_the_first_step_is_not_in_the_median() -> None:
    runs = [Run(frames=None, first_step=100.0, steps=steps, total=1.0) for steps in ([1.0, 9.0], [2.0])]
    assert median_step(runs) == 2.0
    assert median_step([Run(frames=None, first_step=100.0, steps=[], total=1.0)]) is None


def test_diffusers_transformer_can_be_had_too(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[dict[str, Any]] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda _, **options: compiled.append(options))
    model, cpu = locate_pipeline("tiny"), torch.device("cpu")
    pipe = open_pipeline(model, Setting(transformer="diffusers", compile=True), device=cpu)
    assert type(pipe.transformer).__module__.startswith("diffusers.")
    assert pipe.transformer.dtype == open_pipeline(model, Setting(), device=cpu).transformer.dtype
    assert compiled == [{"fullgraph": True}]
    half = open_pipeline(model, Setting(transformer="diffusers", dtype=torch.bfloat16), device=cpu)
    assert half.transformer.dtype == half.vae.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="does not say in which dtype"):
        open_pipeline(dataclasses.replace(model, weights=None), Setting(transformer="diffusers"), device=cpu)


def test_fp32_stands_in_for_what_the_cpu_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, cpu_device = locate_pipeline("tiny"), torch.device("cpu")
    lacking = torch.bfloat16
    for module in (cpu, generation):
        monkeypatch.setattr(module, "computes", lambda dtype: dtype != lacking)
    for setting in (Setting(), Setting(transformer="diffusers")):
        assert "no bf16 instructions" in str(dtype_warning(model, setting, cpu_device))
        assert open_pipeline(model, setting, device=cpu_device).transformer.dtype == torch.float32
    remote = dataclasses.replace(model, weights=None)  # as a hub id that is not here yet
    assert dtype_warning(remote, Setting(), cpu_device) is not None
    assert dtype_warning(model, Setting(dtype=torch.bfloat16), cpu_device) is None
    assert dtype_warning(model, Setting(), torch.device("cuda")) is None
    lacking = torch.float16
    assert dtype_warning(model, Setting(), cpu_device) is None
    assert open_pipeline(model, Setting(), device=cpu_device).transformer.dtype == torch.bfloat16


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="choose one of sdpa, flex"):
        Setting(attention="slow")
    with pytest.raises(ValueError, match="attention is 'sdpa', which diffusers' transformer does not take"):
        Setting(transformer="diffusers", attention="sdpa")
    with pytest.raises(ValueError, match="quant is 'int8-dynamic', which diffusers' transformer does not take"):
        Setting(transformer="diffusers", quant="int8-dynamic")
