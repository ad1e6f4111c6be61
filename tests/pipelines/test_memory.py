"""What fits on a GPU is put there, and what does not is offloaded: by the released pipelines' true sizes."""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cogx_fast.config import PRESETS
from cogx_fast.measure.costs import memory
from cogx_fast.pipelines.memory import Needs, choose, phases
from cogx_fast.pipelines.peaks import decode_peak, step_peak
from cogx_fast.sizes import count_tokens, default_video
from tests.cases import for_each

GIB = 1 << 30
TEXT_ENCODER, VAE = 8.87, 0.41
"""GiB in 16 bits: T5-XXL's encoder, and the VAE."""
TILE = (240, 360)


@functools.cache
def needs(preset: str) -> Needs:
    config, video = PRESETS[preset], default_video(PRESETS[preset])
    transformer = memory(config)["bf16/fp16"]
    weights = {"text_encoder": round(TEXT_ENCODER * GIB), "transformer": transformer, "vae": round(VAE * GIB)}
    half = {"dtype": torch.bfloat16}
    return Needs(
        weights=weights,
        streamed=round(0.06 * transformer),
        step=step_peak(config, count_tokens(config, video), batch=2, dtype=torch.bfloat16),
        decode=decode_peak({}, video.height, video.width, **half),
        tiled_decode=decode_peak({}, *TILE, **half) + 8 * video.frames * video.height * video.width,
    )


def test_peaks_are_those_that_torchs_allocator_counted() -> None:
    """On the stand-in for a GPU, at full size (tests/cuda_standin holds the steps' again).

    In a process of its own: where one has compiled, Python's frames keep what they call others with, and an eager step
    one stream more (torch's hook on frames).
    """
    counted = {"2b": (1.27, 14.75, 3.77), "5b": (2.26, 14.75, 3.77), "1.5-5b": (5.73, 44.55, 4.18)}
    script = (
        "import json, sys\nfrom tests.pipelines.test_memory import needs\n"
        "found = {name: needs(name) for name in sys.argv[1:]}\n"
        "print(json.dumps({name: (each.step, each.decode, each.tiled_decode) for name, each in found.items()}))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script, *counted], cwd=root, check=True, capture_output=True, text=True
    )
    for preset, sizes in json.loads(done.stdout.splitlines()[-1]).items():
        for size, expected in zip(sizes, counted[preset], strict=True):
            assert size / GIB == pytest.approx(expected, rel=0.05), preset


@for_each(
    "preset, gib, kind, tiled",
    [
        ("5b", 8, "sequential", True),  # the text encoder alone has more
        ("5b", 12, "blocks", True),
        ("5b", 16, "model", True),
        ("5b", 24, "model", False),
        ("5b", 80, "none", False),
        ("2b", 8, "sequential", True),
        ("2b", 12, "model", True),
        ("2b", 24, "none", True),
        ("2b", 80, "none", False),
        ("1.5-5b", 12, "blocks", True),
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
    order = ["sequential", "blocks", "model", "none"]
    kinds = [order.index(choose(needs("5b"), gib * GIB).kind) for gib in range(4, 80)]
    assert kinds == sorted(kinds)


@for_each("kind", ["none", "model", "blocks", "sequential"], "tiled", [False, True])
def test_what_is_asked_for_is_done(kind: str, tiled: bool) -> None:
    for gib in (8, 80):
        chosen = choose(needs("5b"), gib * GIB, kind=kind, vae_tiling=tiled)
        assert (chosen.kind, chosen.vae_tiling) == (kind, tiled)
        assert "as asked for" in chosen.reason
    assert choose(needs("5b"), 24 * GIB, kind="none").vae_tiling


def test_an_unknown_layout_is_named() -> None:
    from cogx_fast.pipelines.generation import Setting

    with pytest.raises(ValueError, match="offload is 'disk', expected None or one of none, model, blocks, sequential"):
        Setting(offload="disk")
    with pytest.raises(ValueError, match="'blocks', which diffusers' transformer does not take"):
        Setting(offload="blocks", transformer="diffusers")


def test_blocks_that_cannot_be_streamed_are_not_reckoned_with() -> None:
    whole = dataclasses.replace(needs("5b"), streamed=None)
    assert choose(whole, round(11.5 * GIB)).kind == "sequential"
    assert phases(whole, "blocks", tiled=True) == {}
