"""One denoising step of the tiny model: diffusers' transformer and ours, eager and compiled (``make bench``)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import cogx_fast
from cogx_fast.config import PRESETS

CONFIG = PRESETS["tiny"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def upstream() -> Any:
    from diffusers import CogVideoXTransformer3DModel

    torch.manual_seed(0)
    return CogVideoXTransformer3DModel(**CONFIG).to(DEVICE).eval()


@pytest.fixture(scope="module", params=["diffusers", "diffusers compiled", "ours", "ours compiled"])
def model(request: pytest.FixtureRequest, upstream: Any) -> Any:
    own = copy.deepcopy(upstream)
    match request.param:
        case "diffusers":
            return own
        case "diffusers compiled":
            return torch.compile(own, fullgraph=True)
        case "ours":
            return cogx_fast.load(own)
        case _:
            return cogx_fast.load(own, compile=True)


@pytest.fixture(scope="module")
def arguments() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    frames = (CONFIG.sample_frames - 1) // CONFIG.temporal_compression_ratio + 1
    latents = (2, frames, CONFIG.in_channels, CONFIG.sample_height, CONFIG.sample_width)
    text = (2, CONFIG.max_text_seq_length, CONFIG.text_embed_dim)
    tokens = frames * (CONFIG.sample_height // 2) * (CONFIG.sample_width // 2)
    angles = torch.rand(tokens, CONFIG.attention_head_dim, generator=generator)
    return {
        "hidden_states": torch.randn(latents, generator=generator).to(DEVICE),
        "encoder_hidden_states": torch.randn(text, generator=generator).to(DEVICE),
        "timestep": torch.tensor([500, 500], device=DEVICE),
        "image_rotary_emb": (angles.cos().to(DEVICE), angles.sin().to(DEVICE)),
        "return_dict": False,
    }


def test_step(benchmark: Callable[..., Any], model: Any, arguments: dict[str, Any]) -> None:
    def step() -> torch.Tensor:
        with torch.no_grad():
            noise: torch.Tensor = model(**arguments)[0]
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return noise

    step()  # compiles
    noise = benchmark.pedantic(step, rounds=50, warmup_rounds=5)  # type: ignore[attr-defined]
    assert noise.isfinite().all()
