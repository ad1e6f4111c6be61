"""diffusers' pipelines in every order of ``accelerate``, devices and offload: what ran where, and what stayed there."""

from __future__ import annotations

import dataclasses
import gc
from typing import Any

import pytest
import torch

import cogx_fast
from benchmarks.standin import journal
from cogx_fast.config import TransformerConfig
from cogx_fast.pipelines.generation import Setting, is_compiled, open_pipeline
from cogx_fast.pipelines.locate import locate_pipeline
from cogx_fast.runtime.attached import AttachedError
from cogx_fast.runtime.compiling.compile import CompileConfig
from cogx_fast.runtime.compiling.recompiles import watch_compilation
from cogx_fast.sizes import VideoSize
from tests import pipes
from tests.cuda_standin.device import FAST, attention_kernels, peak_bytes
from tests.pipes import FRAMES, HEIGHT, KINDS, WIDTH, make_pipe
from tests.support import upstream

LAYERS, STEPS, MIB = 2, 2, 1024**2


def pipeline(
    kind: str = "CogVideoXPipeline", preset: str = "5b", dtype: torch.dtype = torch.bfloat16, **sizes: int
) -> Any:
    """A small pipeline, with parts of its own, since hooks stay on them; ``sizes`` are those of its transformer."""
    pipes._frozen_parts.cache_clear()
    pipe = make_pipe(kind, preset)
    if sizes:
        config = TransformerConfig.from_dict(dict(pipe.transformer.config))
        pipe.transformer = upstream(dataclasses.replace(config, **sizes))
    return with_timesteps_on_the_cpu(pipe.to(dtype))


def with_timesteps_on_the_cpu(pipe: Any) -> Any:
    """The same: its scheduler computes with timesteps and reads them back, which the stand-in device cannot give."""
    set_timesteps = pipe.scheduler.set_timesteps
    pipe.scheduler.set_timesteps = lambda *args, device=None, **options: set_timesteps(*args, device="cpu", **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: Any) -> journal.Journal:
    """Two steps to latents, with what they asked the device for; the text is encoded before."""
    wanted, unwanted = pipe.encode_prompt("a panda", max_sequence_length=8)
    journal.clear()
    latents = pipe(
        prompt_embeds=wanted, negative_prompt_embeds=unwanted, height=HEIGHT, width=WIDTH, num_frames=FRAMES,
        num_inference_steps=STEPS, guidance_scale=6.0, max_sequence_length=8, output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).frames  # fmt: skip
    assert latents.device.type == "cuda"
    return journal.read()


def model_offload(pipe: Any) -> None:
    pipe.enable_model_cpu_offload()


def sequential_offload(pipe: Any) -> None:
    pipe.enable_sequential_cpu_offload()


def group_offload(pipe: Any) -> None:
    from diffusers.hooks import apply_group_offloading

    pipe.to("cuda")
    apply_group_offloading(
        pipe.transformer, onload_device=torch.device("cuda"), offload_device=torch.device("cpu"),
        offload_type="block_level", num_blocks_per_group=1,
    )  # fmt: skip


def to_device(pipe: Any) -> None:
    pipe.to("cuda")


ORDERS = {"to": to_device, "model": model_offload, "sequential": sequential_offload, "group": group_offload}
EAGER = [(order, False) for order in ORDERS]


@pytest.mark.cards("h100")
@pytest.mark.parametrize(("order", "compile"), [*EAGER[:3], ("to", FAST), ("model", FAST)])
def test_placed_before_accelerate(order, compile):
    pipe = pipeline()
    ORDERS[order](pipe)
    cogx_fast.accelerate(pipe, attention="sdpa-flash" if order == "to" else "sdpa", compile=compile)
    with watch_compilation() as stats:
        generate(pipe)
        done = generate(pipe)
    assert sum(attention_kernels(done).values()) == STEPS * LAYERS
    assert stats.recompiles == 0
    assert bool(done.triton) is bool(compile)


@pytest.mark.cards("h100")
@pytest.mark.parametrize(("order", "compile"), [*EAGER, ("to", FAST), ("model", FAST), ("group", FAST)])
def test_placed_after_accelerate(order, compile):
    pipe = cogx_fast.accelerate(pipeline(), compile=compile)
    ORDERS[order](pipe)
    with watch_compilation() as stats:
        generate(pipe)
        done = generate(pipe)
    assert sum(attention_kernels(done).values()) == STEPS * LAYERS, "the kernel was chosen for the CPU"
    assert stats.recompiles == 0
    assert bool(done.triton) is bool(compile)


@pytest.mark.cards("t4", "a100", "rtx3060", "rtx4060", "rtx4090", "b200")
def test_accelerated_on_every_card():
    preset, dtype = ("2b", torch.float16) if torch.cuda.get_device_capability()[0] < 8 else ("5b", torch.bfloat16)
    pipe = cogx_fast.accelerate(pipeline(preset=preset, dtype=dtype), attention="auto", compile=FAST)
    pipe.enable_model_cpu_offload()
    generate(pipe)
    done = generate(pipe)
    assert done.triton
    assert sum(attention_kernels(done).values()) == STEPS * LAYERS


@pytest.mark.cards("h100")
def test_a_pipeline_replays_cuda_graphs():
    pipe = cogx_fast.accelerate(
        pipeline().to("cuda"), attention="sdpa", compile=CompileConfig(scope="model", mode="reduce-overhead")
    )
    done = [generate(pipe) for _ in range(3)][-1]
    assert len(done.replays) == STEPS
    assert not done.triton


@pytest.mark.cards("h100")
def test_what_moves_weights_inside_compiled_code_is_refused_with_words():
    pipe = pipeline()
    group_offload(pipe)
    with pytest.raises(AttachedError, match=r"call accelerate before enabling .* group offloading"):
        cogx_fast.accelerate(pipe)
    pipe = pipeline()
    pipe.enable_sequential_cpu_offload()
    with pytest.raises(AttachedError, match=r"enable_model_cpu_offload\(\)"):
        cogx_fast.accelerate(pipe, compile=FAST)
    pipe = cogx_fast.accelerate(pipeline(), compile=FAST)
    pipe.enable_sequential_cpu_offload()
    with pytest.raises(AttachedError, match=r"enable_model_cpu_offload\(\)"):
        generate(pipe)


@pytest.mark.cards("h100")
@pytest.mark.parametrize("recipe", [None, "fp8-dynamic"])
def test_accelerating_on_the_device_needs_two_blocks_more_than_what_it_makes(recipe):
    layers = 8
    pipe = pipeline(num_attention_heads=16, num_layers=layers).to("cuda")
    held = torch.cuda.memory_allocated()
    weights = sum(tensor.numel() * tensor.element_size() for tensor in pipe.transformer.state_dict().values())
    with peak_bytes() as peak:
        cogx_fast.accelerate(pipe, attention="sdpa", quant=recipe)
    gc.collect()
    now = torch.cuda.memory_allocated() - held
    assert now < (0.01 if recipe is None else -0.4) * weights
    # quantized weights stand beside the pipeline's own until all are made: it works, or leaves the pipeline as it was
    made = 0 if recipe is None else weights + now
    assert peak[0] < made + 2 * weights / layers, f"{peak[0] / weights:.2f} of the weights on top of them"


@pytest.mark.cards("h100")
def test_model_offload_leaves_the_device_empty_between_calls():
    pipe = pipeline()
    pipe.enable_model_cpu_offload()
    cogx_fast.accelerate(pipe, attention="sdpa")
    generate(pipe)
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    assert pipe.transformer.device.type == "cpu"
    assert torch.cuda.memory_allocated() < MIB


@pytest.mark.cards("h100")
def test_a_pipeline_on_the_second_device():
    pipe = cogx_fast.accelerate(pipeline().to("cuda:1"), compile=FAST)
    generate(pipe)
    assert generate(pipe).devices == {1}


@pytest.mark.cards("h100")
@pytest.mark.parametrize(("kind", "preset"), [(kind, presets[0]) for kind, presets in KINDS.items()])
def test_every_pipeline_generates_a_video(kind, preset, monkeypatch):
    pipe = cogx_fast.accelerate(pipeline(kind, preset).to("cuda"), compile=FAST)
    monkeypatch.setattr(torch.backends.cudnn, "enabled", False)  # its convolutions are not stood in for
    journal.clear()
    pipes.generate(pipe)
    assert sum(attention_kernels(journal.read()).values()) >= LAYERS


@pytest.mark.cards("h100")
def test_a_loaded_pipeline_with_a_device_map(tmp_path):
    from diffusers import CogVideoXPipeline

    pipeline().save_pretrained(tmp_path)
    pipe = with_timesteps_on_the_cpu(
        CogVideoXPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16, device_map="cuda")
    )
    cogx_fast.accelerate(pipe, compile=FAST)
    generate(pipe)
    assert sum(attention_kernels(generate(pipe)).values()) == STEPS * LAYERS
    with torch.no_grad():
        model = cogx_fast.load(tmp_path, device="cuda", compile=FAST)
    pipe = with_timesteps_on_the_cpu(
        CogVideoXPipeline.from_pretrained(tmp_path, transformer=model, torch_dtype=torch.bfloat16).to("cuda")
    )
    generate(pipe)
    assert sum(attention_kernels(generate(pipe)).values()) == STEPS * LAYERS


@pytest.mark.parametrize(
    ("asked", "free", "kind"),
    [
        (None, 79, "whole pipeline"),
        ("model", 79, "model offload"),
        (None, 1, "sequential"),
        ("sequential", 79, "sequential"),
    ],
)
def test_the_command_lines_pipeline_is_laid_out_by_what_is_free(tmp_path, monkeypatch, asked, free, kind):
    pipeline().save_pretrained(tmp_path)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (free * 1024 * MIB, 79 * 1024 * MIB))
    setting = Setting(dtype=torch.bfloat16, attention="sdpa", compile=asked == "model", offload=asked)
    size, told = VideoSize(frames=FRAMES, height=HEIGHT, width=WIDTH), []
    pipe = open_pipeline(
        locate_pipeline(str(tmp_path)), setting, device=torch.device("cuda"), size=size, tell=told.append
    )
    pipe = with_timesteps_on_the_cpu(pipe)
    done = generate(pipe)
    assert kind in told[0]
    assert sum(attention_kernels(done).values()) == LAYERS * STEPS
    assert is_compiled(pipe) == (asked == "model")
    lies = {"whole pipeline": "cuda", "model offload": "cpu", "sequential": "meta"}[kind]
    assert {part.device.type for part in pipe.transformer.parameters()} == {lies}
