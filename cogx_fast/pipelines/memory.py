"""Where a pipeline's parts lie while it runs on a GPU: all there, or offloaded to the CPU, by what memory allows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from cogx_fast.config import TransformerConfig
from cogx_fast.model.transformer import CogVideoXTransformer
from cogx_fast.runtime.compiling.symbols import quantizes_activations
from cogx_fast.runtime.streaming import SLOTS, stream_blocks
from cogx_fast.runtime.tensors import plain_tensors
from cogx_fast.sizes import Tokens, VideoSize
from cogx_fast.weights.live import model_config

OFFLOADS = ("none", "model", "blocks", "sequential")
"""Everything on the GPU; each part while it computes; the same with the transformer's blocks streamed and its schedule
baked; each layer while it computes (diffusers' own)."""

_STEPS = 50
"""Timesteps of the baked schedule that is reckoned with."""
_QUANTIZING_STREAMS = 35
"""Copies of the token stream that a step holds where activations are quantized eagerly, pass by pass, by torch's
allocator: fp8 34.0, int8 24.0. ``tests/cuda_standin`` holds these figures."""
SPARE = 1 << 30
"""What is left to CUDA's context, libraries' workspaces and the allocator's gaps."""
_GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Bytes that a pipeline needs on a GPU."""

    weights: Mapping[str, int]
    """Of each part by its name in the pipeline; the one that denoises is "transformer"."""
    streamed: int | None
    """Of the transformer with its blocks streamed and its schedule baked; None: it cannot be."""
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
    """What a pipeline needs for a video: its real weights, and the peaks of its real code (``pipelines.peaks``).

    Args:
        pipe: a CogVideoX pipeline with its parts loaded anywhere.
        tokens: of one video.
        size: of the video.
        batch: videos in a step; guidance makes two of one.
    """
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    transformer = pipe.transformer
    whole, tiled = decode_bytes(pipe.vae, size)
    return Needs(
        weights={name: stored_bytes(part) for name, part in parts.items()},
        streamed=_streamed_bytes(transformer) if isinstance(transformer, CogVideoXTransformer) else None,
        step=step_bytes(transformer, tokens, batch=batch),
        decode=whole,
        tiled_decode=tiled,
    )


def decode_bytes(vae: Any, size: VideoSize) -> tuple[int, int]:
    """What decoding a video needs beside the VAE's weights: at once, and by tiles."""
    from cogx_fast.pipelines.peaks import decode_peak  # made of private parts of torch

    def decode(height: int, width: int) -> int:
        return decode_peak(vae.config, height, width, dtype=vae.dtype)

    whole = decode(size.height, size.width)
    tile = decode(min(size.height, vae.tile_sample_min_height), min(size.width, vae.tile_sample_min_width))
    video = 4 * size.frames * size.height * size.width * vae.dtype.itemsize  # three colours, and what joins tiles
    return whole, min(whole, tile + video)


def _streamed_bytes(transformer: Any) -> int | None:
    """On the GPU: two blocks, the table of a schedule, and what is around the blocks."""
    compilation = transformer.runner.compilation
    if transformer.runner.package is not None or (compilation and compilation.config.scope == "model"):
        return None
    largest = max(map(stored_bytes, transformer.transformer_blocks))
    blocks = sum(map(stored_bytes, transformer.transformer_blocks))
    around = stored_bytes(transformer) - blocks - stored_bytes(transformer.modulation)
    table = _STEPS * transformer.modulation.linear.out_features * transformer.dtype.itemsize
    return SLOTS * largest + around + table


def released(config: TransformerConfig) -> Any:
    """The parts of a released pipeline in bf16, without values: T5-XXL's encoder, the VAE, a transformer."""
    from diffusers import AutoencoderKLCogVideoX
    from transformers import T5Config, T5EncoderModel

    from cogx_fast.runtime.module import CogVideoXModel

    text = T5Config(d_model=4096, d_ff=10240, num_layers=24, num_heads=64, d_kv=64, feed_forward_proj="gated-gelu")
    with torch.device("meta"):
        made = {
            "text_encoder": T5EncoderModel(text),
            "transformer": CogVideoXModel(config),
            "vae": AutoencoderKLCogVideoX(),
        }
    parts = {name: torch.nn.Module.to(part, torch.bfloat16) for name, part in made.items()}
    return SimpleNamespace(components=parts, **parts)


def step_bytes(transformer: Any, tokens: Tokens, *, batch: int = 2) -> int:
    """What a denoising step needs beside the weights, eager; compiled it is less.

    Args:
        transformer: ours, or diffusers'.
        tokens: of one video.
        batch: videos in the step.
    """
    from cogx_fast.pipelines.peaks import step_peak  # made of private parts of torch

    is_ours = isinstance(transformer, CogVideoXTransformer)
    config = model_config(transformer)
    build = None if is_ours else type(transformer).from_config
    needed = step_peak(config, tokens, batch=batch, dtype=transformer.dtype, build=build)
    if not any(hasattr(each, "__tensor_flatten__") for each in transformer.parameters()):
        return needed
    is_eager = is_ours and transformer.runner.compilation is None and transformer.runner.package is None
    if is_eager and quantizes_activations(transformer):
        return int(_QUANTIZING_STREAMS * batch * tokens.joint * config.inner_dim * transformer.dtype.itemsize)
    linears = [each for each in transformer.transformer_blocks.modules() if isinstance(each, torch.nn.Linear)]
    return needed + unpacked_bytes(max(each.weight.numel() for each in linears), transformer.dtype)


def unpacked_bytes(numel: int, dtype: torch.dtype) -> int:
    """What an eager step holds of one weight that is brought back to its dtype before its product."""
    return 2 * numel * dtype.itemsize


def choose(needs: Needs, free: int, *, kind: str | None = None, vae_tiling: bool | None = None) -> Offload:
    """The fastest layout that fits.

    Args:
        needs: the pipeline's.
        free: bytes of the GPU that can be had.
        kind: the layout, where the user names it.
        vae_tiling: whether the VAE is tiled, where the user says so.
    """
    room = free - SPARE
    weights, vae = needs.weights, needs.weights["vae"]
    at_once, largest = sum(weights.values()), max(weights.values())
    tilings = (False, True) if vae_tiling is None else (vae_tiling,)
    fitting = [
        (name, tiled)
        for name in ("none", "model", "blocks")
        for tiled in tilings
        if kind in (None, name) and max(phases(needs, name, tiled).values(), default=room + 1) <= room
    ]
    if fitting:
        chosen, tiled = fitting[0]
    else:
        chosen, tiled = kind or "sequential", tilings[-1]
    held = f"weights {gib(at_once)} (the largest part {gib(largest)}), a step {gib(needs.step)}"
    decoding = f"decoding {gib(needs.decode)} ({gib(needs.tiled_decode)} tiled), the VAE {gib(vae)}"
    asked = " as asked for" if kind is not None else ""
    return Offload(
        kind=chosen, vae_tiling=tiled,
        reason=f"{WORDS[chosen]}{', VAE tiled' if tiled else ''}{asked}: {gib(free)} are free; {held}, {decoding}",
    )  # fmt: skip


WORDS = {
    "none": "the whole pipeline on the GPU",
    "model": "each part on the GPU while it computes (model offload)",
    "blocks": "each part on the GPU while it computes, the transformer's blocks streamed and its schedule baked",
    "sequential": "each layer on the GPU while it computes (sequential offload, slow)",
}


def phases(needs: Needs, kind: str, tiled: bool) -> dict[str, int]:
    """Bytes on the GPU at the peak of each phase; nothing, where the layout cannot be.

    Args:
        needs: the pipeline's.
        kind: one of ``OFFLOADS`` but "sequential".
        tiled: whether the VAE decodes by tiles.
    """
    weights, decode = needs.weights, needs.tiled_decode if tiled else needs.decode
    transformer = needs.streamed if kind == "blocks" else weights["transformer"]
    if transformer is None:
        return {}
    others = [size for name, size in weights.items() if name not in ("transformer", "vae")]
    text, vae = max(others, default=0), weights["vae"]
    if kind == "none":
        text = transformer = vae = sum(weights.values())
    return {"text": text, "denoise": transformer + needs.step, "decode": vae + decode}


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
    held = sum(stored_bytes(part) for part in pipe.components.values() if _is_on(part, device))
    offload = choose(needs, torch.cuda.mem_get_info(device)[0] + held, kind=kind, vae_tiling=vae_tiling)
    if offload.vae_tiling:
        pipe.vae.enable_tiling()
        pipe.vae.enable_slicing()
    if offload.kind == "none":
        pipe.to(device)
    elif offload.kind in ("model", "blocks"):
        if offload.kind == "blocks":
            pipe.transformer.set_schedule(True)
            stream_blocks(pipe.transformer, torch.device("cpu"))
        pipe.enable_model_cpu_offload(device=device)
    else:
        _run_eagerly(pipe.transformer)
        pipe.enable_sequential_cpu_offload(device=device)
    return offload


def _run_eagerly(transformer: Any) -> None:
    from cogx_fast.runtime.compiling.compile import uncompile_model
    from cogx_fast.runtime.module import CogVideoXModel

    if isinstance(transformer, CogVideoXModel):
        uncompile_model(transformer)


def stored_bytes(part: torch.nn.Module) -> int:
    """Bytes of a part's parameters and buffers, as they are stored."""
    return sum(plain.nbytes for tensor in (*part.parameters(), *part.buffers()) for plain in plain_tensors(tensor))


def _is_on(part: Any, device: torch.device) -> bool:
    return isinstance(part, torch.nn.Module) and next(part.parameters()).device.type == device.type


def gib(size: int) -> str:
    """A number of bytes for people."""
    return f"{size / _GIB:.1f} GiB"


__all__ = [
    "OFFLOADS", "SPARE", "WORDS", "Needs", "Offload", "choose", "decode_bytes", "estimate", "gib", "phases", "place",
    "released", "step_bytes", "stored_bytes", "unpacked_bytes",
]  # fmt: skip
