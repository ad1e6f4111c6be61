"""Where a pipeline's parts lie while it runs on a GPU: all there, or offloaded to the CPU, by what memory allows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cogx_fast.sizes import Tokens, VideoSize

OFFLOADS = ("none", "model", "sequential")
"""Everything on the GPU; each part while it computes; each layer while it computes (diffusers' own)."""

_STEP_STREAMS = 12
"""Copies of the token stream that a step holds at its peak, by torch's allocator: eager 11.2 (2b 10.0), compiled less,
diffusers' 11.9. ``tests/cuda_standin`` holds these figures."""
_QUANTIZING_STREAMS = 35
"""The same where activations are quantized eagerly, by passes over memory: fp8 34.0, int8 24.0."""
_DECODE_VALUES = 22_950
"""Values that decoding holds at its peak for each pixel of a frame, by torch's allocator: 14.75 GiB in bf16 at
480 × 720, 44.55 GiB at 768 × 1360, whatever the number of frames; for a VAE of this many channels at full size, which
all released ones have."""
_CHANNELS = 128
_SPARE = 1 << 30
"""What is left to CUDA's context, libraries' workspaces and the allocator's gaps."""
_GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Bytes that a pipeline needs on a GPU."""

    weights: Mapping[str, int]
    """Of each part by its name in the pipeline; the one that denoises is "transformer"."""
    step: int
    """Of a denoising step, beside its weights."""
    decode: int
    """Of decoding the whole video at once, beside the VAE's weights."""
    tiled_decode: int
    """Of decoding it by tiles."""


@dataclass(frozen=True, kw_only=True)
class Offload:
    """How a pipeline is laid out, and why."""

    kind: str
    """One of ``OFFLOADS``."""
    vae_tiling: bool
    """Whether the VAE decodes by tiles, one video at a time."""
    reason: str


def estimate(pipe: Any, tokens: Tokens, size: VideoSize, *, batch: int = 2) -> Needs:
    """What a pipeline needs for a video: its real weights, and activations that grow with the video's size.

    Args:
        pipe: a CogVideoX pipeline with its parts loaded anywhere.
        tokens: of one video.
        size: of the video.
        batch: videos in a step; guidance makes two of one.
    """
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    vae = pipe.vae
    relative = vae.dtype.itemsize * vae.config.block_out_channels[0] / _CHANNELS

    def decode(pixels: int) -> int:
        return round(_DECODE_VALUES * pixels * relative)

    tile = vae.tile_sample_min_height * vae.tile_sample_min_width
    video = 4 * size.frames * size.height * size.width * vae.dtype.itemsize  # three colours, and what joins tiles
    return Needs(
        weights={name: _bytes(part) for name, part in parts.items()},
        step=step_bytes(pipe.transformer, tokens, batch=batch),
        decode=decode(size.height * size.width),
        tiled_decode=min(decode(size.height * size.width), decode(tile) + video),
    )


def step_bytes(transformer: Any, tokens: Tokens, *, batch: int = 2) -> int:
    """What a denoising step needs beside the weights.

    Args:
        transformer: ours, or diffusers'.
        tokens: of one video.
        batch: videos in the step.
    """
    from cogx_fast.runtime.module import CogVideoXModel
    from cogx_fast.runtime.symbols import quantizes_activations

    streams = _STEP_STREAMS
    if isinstance(transformer, CogVideoXModel) and quantizes_activations(transformer):
        is_eager = transformer.runner.compilation is None and transformer.runner.package is None
        streams = _QUANTIZING_STREAMS if is_eager else _STEP_STREAMS
    config = transformer.config
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return int(streams * batch * tokens.joint * width * transformer.dtype.itemsize)


def choose(needs: Needs, free: int, *, kind: str | None = None, vae_tiling: bool | None = None) -> Offload:
    """The fastest layout that fits.

    Args:
        needs: the pipeline's.
        free: bytes of the GPU that can be had.
        kind: the layout, where the user names it.
        vae_tiling: whether the VAE is tiled, where the user says so.
    """
    room = free - _SPARE
    weights, vae = needs.weights, needs.weights["vae"]
    at_once, largest = sum(weights.values()), max(weights.values())
    tilings = (False, True) if vae_tiling is None else (vae_tiling,)
    fitting = [
        (name, tiled)
        for name, base in (("none", at_once), ("model", 0))
        for tiled in tilings
        if _peak(needs, base, tiled) <= room and (kind in (None, name))
    ]
    if fitting:
        chosen, tiled = fitting[0]
    else:
        chosen, tiled = kind or "sequential", tilings[-1]
    held = f"weights {_gib(at_once)} (the largest part {_gib(largest)}), a step {_gib(needs.step)}"
    decoding = f"decoding {_gib(needs.decode)} ({_gib(needs.tiled_decode)} tiled), the VAE {_gib(vae)}"
    asked = " as asked for" if kind is not None else ""
    return Offload(
        kind=chosen, vae_tiling=tiled,
        reason=f"{_WORDS[chosen]}{', VAE tiled' if tiled else ''}{asked}: {_gib(free)} are free; {held}, {decoding}",
    )  # fmt: skip


_WORDS = {
    "none": "the whole pipeline on the GPU",
    "model": "each part on the GPU while it computes (model offload)",
    "sequential": "each layer on the GPU while it computes (sequential offload, slow)",
}


def _peak(needs: Needs, base: int, tiled: bool) -> int:
    """With everything there (``base``: its weights) or each part alone (0)."""
    weights = needs.weights
    decode = needs.tiled_decode if tiled else needs.decode
    if base:
        return base + max(needs.step, decode)
    others = [size for name, size in weights.items() if name not in ("transformer", "vae")]
    return max(weights["transformer"] + needs.step, weights["vae"] + decode, *others)


def place(
    pipe: Any, device: torch.device, needs: Needs, *, kind: str | None = None, vae_tiling: bool | None = None
) -> Offload:
    """Lay a pipeline out on a GPU. With sequential offload its transformer runs eagerly, which torch cannot compile.

    Args:
        pipe: its parts on the CPU, or already there.
        device: the GPU.
        needs: of ``estimate``.
        kind: one of ``OFFLOADS``; None chooses by what is free.
        vae_tiling: None chooses.
    """
    held = sum(_bytes(part) for part in pipe.components.values() if _is_on(part, device))
    offload = choose(needs, torch.cuda.mem_get_info(device)[0] + held, kind=kind, vae_tiling=vae_tiling)
    if offload.vae_tiling:
        pipe.vae.enable_tiling()
        pipe.vae.enable_slicing()
    if offload.kind == "none":
        pipe.to(device)
    elif offload.kind == "model":
        pipe.enable_model_cpu_offload(device=device)
    else:
        _run_eagerly(pipe.transformer)
        pipe.enable_sequential_cpu_offload(device=device)
    return offload


def _run_eagerly(transformer: Any) -> None:
    from cogx_fast.runtime.compile import uncompile_model
    from cogx_fast.runtime.module import CogVideoXModel

    if isinstance(transformer, CogVideoXModel):
        uncompile_model(transformer)


def _bytes(part: torch.nn.Module) -> int:
    return sum(_stored(tensor) for tensor in [*part.parameters(), *part.buffers()])


def _stored(tensor: Any) -> int:
    """Bytes of a tensor, or of those that it is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return int(tensor.numel() * tensor.element_size())
    names, _ = tensor.__tensor_flatten__()
    return sum(_stored(getattr(tensor, name)) for name in names)


def _is_on(part: Any, device: torch.device) -> bool:
    return isinstance(part, torch.nn.Module) and next(part.parameters()).device.type == device.type


def _gib(size: int) -> str:
    return f"{size / _GIB:.1f} GiB"


__all__ = ["OFFLOADS", "Needs", "Offload", "choose", "estimate", "place", "step_bytes"]
