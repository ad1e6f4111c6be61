"""Our transformer inside unmodified diffusers pipelines gives the video that diffusers' own gives."""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import cogx_fast
from cogx_fast.runtime.compiling.compile import watch_compilation
from cogx_fast.runtime.for_diffusers.upstream import model_class
from cogx_fast.runtime.module import CogVideoXModel
from cogx_fast.runtime.step_caching.step_schedule import StepSchedule
from cogx_fast.video.quality import psnr
from tests.cases import for_each
from tests.pipes import KINDS, generate, make_pipe
from tests.support import AROUND

SAME_VIDEO_DB = 60.0

PIPES = [(kind, preset) for kind, presets in KINDS.items() for preset in presets]


def swapped(pipe: Any, **options: Any) -> Any:
    """The pipeline with our transformer; the one handed over keeps diffusers'."""
    other = type(pipe)(**pipe.components)
    other.set_progress_bar_config(disable=True)
    other.transformer = copy.deepcopy(pipe.transformer)
    return cogx_fast.accelerate(other, **options)


def assert_same_video(ours: Any, theirs: Any) -> None:
    assert ours.shape == theirs.shape
    assert theirs.std() > 0.01, "a blank video compares with anything"
    assert psnr(ours, theirs) >= SAME_VIDEO_DB


@for_each("kind, preset", PIPES, "guidance_scale", [6.0, 1.0])
def test_every_pipeline_and_model_gives_the_same_video(kind: str, preset: str, guidance_scale: float) -> None:
    pipe = make_pipe(kind, preset)
    ours = generate(swapped(pipe), guidance_scale=guidance_scale)
    assert_same_video(ours, generate(pipe, guidance_scale=guidance_scale))


@pytest.fixture(scope="module")
def pipe() -> Any:
    return make_pipe("CogVideoXPipeline", "5b")


OPTIONS: dict[str, dict[str, Any]] = {
    "dynamic cfg": {"use_dynamic_cfg": True, "num_inference_steps": 3},
    "two prompts": {"prompt": ["a panda", "a red car on a road"]},
    "two videos per prompt": {"num_videos_per_prompt": 2},
    "negative prompt": {"negative_prompt": "blurry"},
    "prompt shorter than the maximum": {"max_sequence_length": 5},
    "another size and length": {"height": 32, "width": 80, "num_frames": 5},
    "attention_kwargs": {"attention_kwargs": {"scale": 1.0}},
    "prompt embeddings": {
        "prompt_embeds": torch.linspace(-1, 1, 8 * 64).view(1, 8, 64),
        "negative_prompt_embeds": torch.zeros(1, 8, 64),
    },
}


@for_each("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option_gives_the_same_video(pipe: Any, options: dict[str, Any]) -> None:
    assert_same_video(generate(swapped(pipe), **options), generate(pipe, **options))


@for_each("preset", ["2b", "5b", "1.5-5b"])
def test_dpm_scheduler_gives_the_same_video(preset: str) -> None:
    pipe = make_pipe("CogVideoXPipeline", preset, scheduler="CogVideoXDPMScheduler")
    assert_same_video(generate(swapped(pipe), num_inference_steps=3), generate(pipe, num_inference_steps=3))


def test_callbacks_see_and_change_the_same_latents(pipe: Any) -> None:
    seen: list[torch.Tensor] = []

    def halve(_pipe: Any, step: int, _t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        seen.append(kwargs["latents"].clone())
        return {"latents": kwargs["latents"] * 0.5} if step == 0 else kwargs

    ours = generate(swapped(pipe), callback_on_step_end=halve)
    assert_same_video(ours, generate(pipe, callback_on_step_end=halve))
    torch.testing.assert_close(seen[0], seen[2], rtol=1e-4, atol=1e-4)
    assert len(seen) == 4


def test_from_pretrained_takes_our_model_without_a_warning(
    pipe: Any, tmp_path: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    pipe.save_pretrained(tmp_path)
    model = cogx_fast.load(tmp_path)
    capfd.readouterr()
    other = type(pipe).from_pretrained(tmp_path, transformer=model)
    assert "xpected type" not in capfd.readouterr().err
    assert other.transformer is model
    other.set_progress_bar_config(disable=True)
    assert_same_video(generate(other), generate(pipe))


def test_assigning_the_transformer_is_enough(pipe: Any) -> None:
    other = type(pipe)(**pipe.components)
    other.set_progress_bar_config(disable=True)
    other.transformer = cogx_fast.load(copy.deepcopy(pipe.transformer))
    assert_same_video(generate(other), generate(pipe))


def test_a_saved_pipeline_is_diffusers_own_again(pipe: Any, tmp_path: Any) -> None:
    ours = swapped(pipe)
    ours.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "CogVideoXTransformer3DModel"]
    again = type(pipe).from_pretrained(tmp_path)
    assert not isinstance(again.transformer, CogVideoXModel)
    again.set_progress_bar_config(disable=True)
    np.testing.assert_array_equal(generate(again), generate(pipe))


def test_pipe_to_casts_the_model(pipe: Any) -> None:
    other = type(pipe)(**{name: copy.deepcopy(part) for name, part in pipe.components.items()})
    other.set_progress_bar_config(disable=True)
    cogx_fast.accelerate(other).to(torch.bfloat16)
    assert {p.dtype for p in other.transformer.parameters()} == {torch.bfloat16}
    assert psnr(generate(other), generate(pipe)) > 20


def test_model_cpu_offload_works_enabled_afterwards(pipe: Any) -> None:
    """Before: tests/pipelines/test_placement.py."""
    expected = generate(pipe)
    other = type(pipe)(**{name: copy.deepcopy(part) for name, part in pipe.components.items()})
    other.set_progress_bar_config(disable=True)
    cogx_fast.accelerate(other)
    other.enable_model_cpu_offload(device="cpu")
    assert hasattr(other.transformer, "_hf_hook")
    assert_same_video(generate(other), expected)
    assert_same_video(generate(other), expected)  # the hooks are applied anew after each call


def test_offload_module_by_module_works(pipe: Any) -> None:
    """What ``enable_sequential_cpu_offload`` does to the transformer (with T5 it fails on a machine without a GPU)."""
    import accelerate

    ours = swapped(pipe)
    expected = generate(ours)
    accelerate.cpu_offload(ours.transformer, torch.device("cpu"))
    assert {p.device.type for p in ours.transformer.parameters()} == {"meta"}, "weights are held by the hooks"
    np.testing.assert_array_equal(generate(ours), expected)


def test_the_progress_bar_counts_steps_as_before(pipe: Any, capfd: pytest.CaptureFixture[str]) -> None:
    ours = swapped(pipe)
    ours.set_progress_bar_config(disable=False)
    generate(ours, num_inference_steps=3)
    assert "3/3" in capfd.readouterr().err


def test_cache_context_is_entered_and_left(pipe: Any) -> None:
    with swapped(pipe).transformer.cache_context("cond_uncond", step_index=3):
        pass


def test_the_model_is_a_diffusers_model(pipe: Any) -> None:
    import diffusers

    model = swapped(pipe).transformer
    assert isinstance(model, diffusers.ModelMixin)
    assert isinstance(model, model_class())
    assert dict(model.config) == {k: v for k, v in pipe.transformer.config.items() if not k.startswith("_")}
    assert model.config.num_layers == pipe.transformer.config["num_layers"]
    assert model.num_parameters() == pipe.transformer.num_parameters()
    output = model(torch.zeros(1, 3, 8, 6, 4), torch.zeros(1, 8, 64), torch.tensor([1]))
    assert isinstance(output, diffusers.models.modeling_outputs.Transformer2DModelOutput)


# -- what must be refused ----------------------------------------------------------------------------------------------


def test_accelerate_refuses_what_is_no_cogvideox_pipeline(pipe: Any) -> None:
    with pytest.raises(ValueError, match="expected CogVideoXTransformer3DModel"):
        cogx_fast.accelerate(object())
    other = type(pipe)(**pipe.components)
    other.transformer = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="expected diffusers' CogVideoXTransformer3DModel"):
        cogx_fast.accelerate(other)


def test_a_step_schedule_of_another_scheduler_is_told() -> None:
    pipe = make_pipe("CogVideoXPipeline", "5b")
    layers = pipe.transformer.config.num_layers
    made = StepSchedule(blocks=(layers, 0), num_layers=layers, scheduler="CogVideoXDPMScheduler")
    with pytest.warns(UserWarning, match="made with CogVideoXDPMScheduler and the pipeline has CogVideoXDDIMScheduler"):
        cogx_fast.accelerate(pipe, step_cache=made)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        cogx_fast.accelerate(pipe, step_cache=replace(made, scheduler="CogVideoXDDIMScheduler"))


def test_accelerating_twice_keeps_one_set_of_weights(pipe: Any) -> None:
    ours = swapped(pipe)
    first = ours.transformer
    again = cogx_fast.accelerate(ours, compile=cogx_fast.CompileConfig(backend="eager")).transformer
    assert again is not first
    assert again.proj_out.weight.data_ptr() == first.proj_out.weight.data_ptr()
    assert_same_video(generate(ours), generate(pipe))


def test_diffusers_caches_say_why_they_cannot_work(pipe: Any) -> None:
    from diffusers import PyramidAttentionBroadcastConfig

    model = swapped(pipe).transformer
    with pytest.raises(ValueError, match="separate text and video streams"):
        model.enable_cache(PyramidAttentionBroadcastConfig())
    with pytest.raises(ValueError, match=r"device_map is given.*cogx_fast\.load"):
        type(model).from_pretrained("somewhere", device_map="auto")


# -- compiled ----------------------------------------------------------------------------------------------------------


def test_compiled_pipeline_gives_the_same_video_without_compiling_again(pipe: Any) -> None:
    expected = [generate(pipe, prompt=prompt, num_inference_steps=3) for prompt in ("a panda", "a red car")]
    with watch_compilation() as stats:
        ours = swapped(pipe, compile=True)
        videos = [generate(ours, prompt=prompt, num_inference_steps=3) for prompt in ("a panda", "a red car")]
    assert (stats.graphs, stats.breaks, stats.recompiles) == (1 + AROUND, 0, 0)
    for video, reference in zip(videos, expected, strict=True):
        assert_same_video(video, reference)
