"""What fits on a GPU is put there, and what does not is offloaded: by the released pipelines' true sizes."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from cogx_fast.config import PRESETS
from cogx_fast.measure.costs import memory
from cogx_fast.pipelines.memory import Needs, choose, step_bytes
from cogx_fast.runtime.module import CogVideoXModel
from cogx_fast.sizes import count_tokens, default_video

GIB = 1 << 30
TEXT_ENCODER, VAE = 8.87, 0.41
"""GiB in 16 bits: T5-XXL's encoder, and the VAE."""
DECODE, TILED = {"2b": 14.75, "5b": 14.75, "1.5-5b": 44.55}, {"2b": 3.77, "5b": 3.77, "1.5-5b": 4.18}
"""GiB that decoding the model's own video takes, as torch's allocator counted it."""


def needs(preset: str) -> Needs:
    config = PRESETS[preset]
    with torch.device("meta"):
        model = CogVideoXModel(dataclasses.replace(config, num_layers=1)).to(torch.bfloat16)
    step = step_bytes(model, count_tokens(config, default_video(config)))
    transformer = memory(config)["bf16/fp16"]
    weights = {"text_encoder": round(TEXT_ENCODER * GIB), "transformer": transformer, "vae": round(VAE * GIB)}
    return Needs(
        weights=weights, step=step, decode=round(DECODE[preset] * GIB), tiled_decode=round(TILED[preset] * GIB)
    )


@pytest.mark.parametrize(
    ("preset", "gib", "kind", "tiled"),
    [
        ("5b", 8, "sequential", True),
        ("5b", 12, "sequential", True),
        ("5b", 16, "model", True),
        ("5b", 24, "model", False),
        ("5b", 80, "none", False),
        ("2b", 8, "sequential", True),  # the text encoder alone has more
        ("2b", 12, "model", True),
        ("2b", 24, "none", True),
        ("2b", 80, "none", False),
        ("1.5-5b", 24, "model", True),
        ("1.5-5b", 40, "none", True),
        ("1.5-5b", 80, "none", False),
    ],
)
def test_the_fastest_layout_that_fits(preset: str, gib: int, kind: str, tiled: bool) -> None:
    chosen = choose(needs(preset), round((gib - 0.5) * GIB))
    assert (chosen.kind, chosen.vae_tiling) == (kind, tiled), chosen.reason
    assert f"{gib - 0.5:.1f} GiB are free" in chosen.reason


def test_more_memory_is_never_laid_out_slower() -> None:
    order = ["sequential", "model", "none"]
    kinds = [order.index(choose(needs("5b"), gib * GIB).kind) for gib in range(4, 80)]
    assert kinds == sorted(kinds)


@pytest.mark.parametrize("kind", ["none", "model", "sequential"])
@pytest.mark.parametrize("tiled", [False, True])
def test_what_is_asked_for_is_done(kind: str, tiled: bool) -> None:
    for gib in (8, 80):
        chosen = choose(needs("5b"), gib * GIB, kind=kind, vae_tiling=tiled)
        assert (chosen.kind, chosen.vae_tiling) == (kind, tiled)
        assert "as asked for" in chosen.reason
    assert choose(needs("5b"), 24 * GIB, kind="none").vae_tiling


def test_an_unknown_layout_is_named() -> None:
    from cogx_fast.pipelines.generation import Setting

    with pytest.raises(ValueError, match="offload is 'disk', expected None or one of none, model, sequential"):
        Setting(offload="disk")
