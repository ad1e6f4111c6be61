"""What decoding and a whole call of a pipeline hold at their peak, beside what ``memory=`` predicts of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.cases import BATCH, Case
from benchmarks.gpu.models import DTYPE, UnsupportedError
from cogx_fast.assets import tiny_pipeline_dir
from cogx_fast.pipelines import memory
from cogx_fast.sizes import default_video, latent_frames

STEPS = 2
"""Of a call: more hold no more."""
PROMPT = "the digit one moving left"

Work = tuple[Callable[[], object], int]
"""What is run, and the bytes that it is predicted to hold above what is held before."""


def prepare(case: Case, device: torch.device) -> Work:
    """A case of the parts ``decode`` and ``call``, ready to run.

    Raises:
        UnsupportedError: it takes a GPU.
    """
    return _decode(case, device) if case.part == "decode" else _call(case, device)


def _decode(case: Case, device: torch.device) -> Work:
    vae, video = _pipeline(case, "vae").vae.to(device), default_video(case.config)
    whole, tiled = memory.decode_bytes(vae, video)
    if case.recipe == "tiled":
        vae.enable_tiling()
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    shape = (vae.config.latent_channels, latent_frames(case.config, video.frames), video.height // factor)
    latents = torch.randn(1, *shape, video.width // factor, dtype=DTYPE, device=device)

    def run() -> object:
        with torch.no_grad():
            return vae.decode(latents, return_dict=False)

    return run, tiled if case.recipe == "tiled" else whole


def _call(case: Case, device: torch.device) -> Work:
    kind, tiled = case.recipe, case.recipe == "blocks"  # as a small budget has it
    if kind != "none" and device.type == "cpu":
        raise UnsupportedError(f"{case}: a GPU's memory is what offload is for")
    pipe, video = _pipeline(case), default_video(case.config)
    needs = memory.estimate(pipe, case.tokens, video, batch=BATCH)
    predicted = max(memory.phases(needs, kind, tiled).values())
    if device.type == "cuda":
        memory.place(pipe, device, needs, kind=kind, vae_tiling=tiled)
    if kind == "none":
        predicted -= sum(needs.weights.values())  # which are held before
    pipe.set_progress_bar_config(disable=True)
    text = {"max_sequence_length": case.config.max_text_seq_length, "guidance_scale": 6.0, "num_frames": video.frames}
    return lambda: pipe(
        PROMPT, height=video.height, width=video.width, num_inference_steps=STEPS, output_type="pt",
        generator=torch.Generator().manual_seed(0), **text,
    ), predicted  # fmt: skip


def _pipeline(case: Case, *only: str) -> Any:
    """The model's pipeline on the CPU, or some parts of it; but for the tiny one its values are unset."""
    from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline

    from cogx_fast import accelerate

    tiny = CogVideoXPipeline.from_pretrained(tiny_pipeline_dir(), torch_dtype=DTYPE)
    if case.model == "tiny":
        return accelerate(tiny)
    parts = memory.released(case.config)
    for name, part in parts.components.items():
        if not only or name in only:
            part.to_empty(device="cpu").eval()
    if only:
        return parts
    return CogVideoXPipeline(tokenizer=tiny.tokenizer, scheduler=CogVideoXDDIMScheduler(), **parts.components)
