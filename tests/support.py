"""What many tests share: the five released models cut down to test size, upstream's models of them, inputs, errors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from cogx_fast.config import PRESETS, TransformerConfig

RELEASED = ("2b", "5b", "5b-i2v", "1.5-5b", "1.5-5b-i2v")
AROUND = 2
"""Graphs of a model whose blocks are compiled besides the blocks' own: begin's and head's, without gradients."""


def small(name: str, **changes: Any) -> TransformerConfig:
    """A released model's configuration with its own options and toy sizes."""
    preset = PRESETS[name]
    sizes: dict[str, Any] = {
        "num_attention_heads": 2, "num_layers": 2, "text_embed_dim": 32, "max_text_seq_length": 8, "time_embed_dim": 48,
        "ofs_embed_dim": 48 if preset.ofs_embed_dim else None,
        "sample_height": 12, "sample_width": 10, "sample_frames": 13,
    }  # fmt: skip
    return dataclasses.replace(preset, **(sizes | changes))


def upstream(config: TransformerConfig, *, seed: int = 0) -> Any:
    """diffusers' own model of that configuration: random weights, norms and biases away from their trivial start."""
    from diffusers import CogVideoXTransformer3DModel

    torch.manual_seed(seed)
    model = CogVideoXTransformer3DModel(**config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        if config.use_learned_positional_embeddings:
            model.patch_embed.pos_embedding = torch.randn_like(model.patch_embed.pos_embedding).float() * 0.1
    return model


def inputs(
    config: TransformerConfig,
    *,
    batch: int = 2,
    frames: int = 4,
    height: int | None = None,
    width: int | None = None,
    text_len: int | None = None,
    seed: int = 1,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> dict[str, Any]:
    """Arguments of one call, for upstream's model and ours, without rotary tables."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    size = (height or config.sample_height, width or config.sample_width)
    arguments: dict[str, Any] = {
        "hidden_states": randn(batch, frames, config.in_channels, *size),
        "encoder_hidden_states": randn(batch, text_len or config.max_text_seq_length, config.text_embed_dim),
        "timestep": torch.tensor([500, 20, 999, 1][:batch], device=device),
    }
    if config.ofs_embed_dim is not None:
        arguments["ofs"] = torch.full((1,), 2.0, device=device, dtype=dtype)
    return arguments


def pipeline_rotary(config: TransformerConfig, latents: Tensor) -> tuple[Tensor, Tensor] | None:
    """The tables that diffusers' own pipeline would hand over with these latents, by the pipeline's own method."""
    from types import SimpleNamespace

    from diffusers import CogVideoXPipeline

    if not config.use_rotary_positional_embeddings:
        return None
    pipe = SimpleNamespace(vae_scale_factor_spatial=8, transformer=SimpleNamespace(config=config))
    frames, height, width = latents.shape[1], latents.shape[3] * 8, latents.shape[4] * 8
    return CogVideoXPipeline._prepare_rotary_positional_embeddings(pipe, height, width, frames, latents.device)


def predict(model: Any, arguments: dict[str, Any]) -> Tensor:
    """What a model makes of one call's arguments, without gradients."""
    with torch.no_grad():
        return model(**arguments, return_dict=False)[0]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖, computed in float64."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def without_saturated(schemes: Iterable[str]) -> list[str]:
    """Those whose reference is torch's own product here: oneDNN's of int8 saturates where ONEDNN_MAX_CPU_ISA hides
    VNNI (ours do not: test_cpu)."""
    largest = torch.full((16, 64), 127, dtype=torch.int8)
    is_exact = bool((torch._int_mm(largest, largest.t()) == 64 * 127**2).all())
    return [scheme for scheme in schemes if is_exact or scheme != "int8-dynamic"]
