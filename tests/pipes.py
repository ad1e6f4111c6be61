"""Small diffusers pipelines of every kind, with random weights, for tests of what users do with them."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

from tests.support import small, upstream

HEIGHT, WIDTH, FRAMES = 48, 32, 9
"""Pixels and frames of the test videos: latents of 6 × 4, 3 × 2 patches, 3 latent frames (1.5 pads them to 4)."""

KINDS = {
    "CogVideoXPipeline": ("2b", "5b", "1.5-5b"),
    "CogVideoXImageToVideoPipeline": ("5b-i2v", "1.5-5b-i2v"),
    "CogVideoXVideoToVideoPipeline": ("5b",),
    "CogVideoXFunControlPipeline": ("5b",),
}
"""Pipelines and the models that run in them."""


@functools.cache
def _frozen_parts() -> dict[str, Any]:
    from diffusers import AutoencoderKLCogVideoX
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    from cogx_fast.assets.recipe import TEXT_CONFIG, VAE_CONFIG, vocabulary

    pieces = vocabulary()
    torch.manual_seed(0)
    return {
        "tokenizer": T5Tokenizer(vocab=pieces, extra_ids=0),
        "text_encoder": T5EncoderModel(T5Config(vocab_size=len(pieces), **TEXT_CONFIG)).eval(),
        "vae": AutoencoderKLCogVideoX(**VAE_CONFIG).eval(),
    }


def make_pipe(kind: str, preset: str, *, scheduler: str = "CogVideoXDDIMScheduler") -> Any:
    """A new pipeline of class ``kind`` around upstream's small model of ``preset``; text encoder and VAE are shared."""
    import diffusers

    from cogx_fast.assets.recipe import SCHEDULER_CONFIG

    takes_image = kind in ("CogVideoXImageToVideoPipeline", "CogVideoXFunControlPipeline")
    config = small(
        preset, in_channels=16 if takes_image else 8, out_channels=8, text_embed_dim=64, num_layers=2,
        sample_height=HEIGHT // 8, sample_width=WIDTH // 8, sample_frames=FRAMES,
    )  # fmt: skip
    pipe = getattr(diffusers, kind)(
        transformer=upstream(config),
        scheduler=getattr(diffusers, scheduler)(**SCHEDULER_CONFIG),
        **_frozen_parts(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: Any, **options: Any) -> np.ndarray[Any, Any]:
    """Frames ``(videos, frames, height, width, 3)`` in 0…1 from a fixed seed, two steps unless told otherwise."""
    from PIL import Image

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8))
    extra: dict[str, Any] = {
        "CogVideoXImageToVideoPipeline": {"image": picture},
        "CogVideoXVideoToVideoPipeline": {"video": [picture] * FRAMES, "strength": 1.0},
        "CogVideoXFunControlPipeline": {"control_video": [picture] * FRAMES},
    }.get(type(pipe).__name__, {})
    if "video" not in extra and "control_video" not in extra:
        extra["num_frames"] = FRAMES
    arguments: dict[str, Any] = {
        "prompt": "a panda plays the guitar", "height": HEIGHT, "width": WIDTH, "num_inference_steps": 2,
        "guidance_scale": 6.0, "max_sequence_length": 8, "output_type": "np",
    }  # fmt: skip
    if "prompt_embeds" in options:
        del arguments["prompt"]
    generator = torch.Generator().manual_seed(0)
    return np.asarray(pipe(generator=generator, **(arguments | extra | options)).frames)
