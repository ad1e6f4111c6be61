"""The parts of the transformer around its blocks' attention. Parameter names are diffusers' where the part is the same.

Suffixes: B batch, F latent frames, C channels, H/W latent height/width, S joint tokens, T text tokens, V video tokens,
D model width, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogx_fast.config import TransformerConfig
from cogx_fast.model.part import Part
from cogx_fast.model.products import project
from cogx_fast.model.tracing import is_traced
from cogx_fast.sizes import own_grid


class PatchEmbed(Part):
    """Text and video as one stream of tokens, text first.

    A patch is a linear map of its (C, p_t, p, p) latent values for every version: upstream's convolution of CogVideoX
    1.0 has patches that do not overlap, and is the same map.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.patch_size_t = config.patch_size_t or 1
        values = config.in_channels * self.patch_size_t * self.patch_size**2
        has_bias = config.patch_bias or config.patch_size_t is not None
        self.proj = nn.Linear(values, config.inner_dim, bias=has_bias)
        self.text_proj = nn.Linear(config.text_embed_dim, config.inner_dim)
        if config.use_learned_positional_embeddings:
            grid = own_grid(config)
            tokens = config.max_text_seq_length + math.prod(grid)
            self.register_buffer("pos_embedding", torch.zeros(1, tokens, config.inner_dim))

    def forward(
        self, patches_BVP: Tensor, text_BTE: Tensor, position_1SD: Tensor | None, order_V: Tensor | None = None
    ) -> Tensor:
        """Returns ``x_BSD``; ``position_1SD`` (sin-cos or learned) is added where the model has one.

        ``order_V`` (``patterns.TokenOrder``), which positions have too, is applied to the patches, the smallest tensor.
        """
        if order_V is not None:
            patches_BVP = patches_BVP.index_select(1, order_V)
        x_BSD = torch.cat([self.text_proj(text_BTE), self.proj(patches_BVP)], dim=1)
        return x_BSD if position_1SD is None else x_BSD + position_1SD.to(x_BSD.dtype)


def patchify(latents_BFCHW: Tensor, patch_size: int, patch_size_t: int) -> Tensor:
    """Whole patches of ``latents_BFCHW`` as ``patches_BVP``, their values in the order (C, p_t, p, p)."""
    p, p_t = patch_size, patch_size_t
    frames, _, height, width = latents_BFCHW.shape[1:]
    latents_BFCHW = latents_BFCHW[..., : height // p * p, : width // p * p]
    patches = latents_BFCHW.unflatten(4, (-1, p)).unflatten(3, (-1, p)).unflatten(1, (frames // p_t, p_t))
    # B F' p_t C H' p W' p  ->  B (F' H' W') (C p_t p p)
    return patches.permute(0, 1, 4, 6, 3, 2, 5, 7).flatten(4).flatten(1, 3)


def unpatchify(patches_BVP: Tensor, latents_shape: torch.Size, patch_size: int, patch_size_t: int) -> Tensor:
    """Predicted patches back to ``latents_BFCHW``: H and W of ``latents_shape`` down to whole patches.

    Values stand as (C, p_t, p, p) in a patch.
    """
    grid = (latents_shape[1] // patch_size_t, latents_shape[3] // patch_size, latents_shape[4] // patch_size)
    values = patches_BVP.unflatten(2, (-1, patch_size_t, patch_size, patch_size)).unflatten(1, grid)
    # B F' H' W' C p_t p p  ->  B F' p_t C H' p W' p
    return values.permute(0, 1, 5, 4, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(1, 2)


def timestep_frequencies(timestep_B: Tensor, dim: int, flip_sin_to_cos: bool, freq_shift: int) -> Tensor:
    """Sines and cosines of a timestep (arXiv:2006.11239), ``(B, dim)`` in fp32."""
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timestep_B.device) / (half - freq_shift)
    angles = timestep_B[:, None].float() * torch.exp(-math.log(10_000) * exponents)
    parts = [angles.cos(), angles.sin()] if flip_sin_to_cos else [angles.sin(), angles.cos()]
    return F.pad(torch.cat(parts, dim=-1), (0, dim % 2))


class TimestepEmbedding(Part):
    """Timestep (or ofs) to a vector: frequencies, linear, activation, linear."""

    def __init__(self, config: TransformerConfig, frequencies: int, dim: int) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.flip_sin_to_cos = config.flip_sin_to_cos
        self.freq_shift = config.freq_shift
        self.linear_1 = nn.Linear(frequencies, dim)
        self.act = _TIMESTEP_ACTIVATIONS[config.timestep_activation_fn.lower()]()
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, timestep_B: Tensor, dtype: torch.dtype) -> Tensor:
        wave = timestep_frequencies(timestep_B, self.frequencies, self.flip_sin_to_cos, self.freq_shift)
        return self.linear_2(self.act(self.linear_1(wave.to(dtype))))


_TIMESTEP_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "silu": nn.SiLU, "swish": nn.SiLU, "mish": nn.Mish, "gelu": nn.GELU, "relu": nn.ReLU
}  # fmt: skip


class Modulation(Part):
    """Shift, scale and gate of every block in one product.

    Upstream has a linear in each norm (``norm1.linear``, ``norm2.linear``); all read the same vector, so ours is their
    rows under each other: for each block 12 vectors of D, those of norm 1 then norm 2, each as shift, scale, gate of
    the video and shift, scale, gate of the text.
    """

    VECTORS = 12

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.num_layers = config.num_layers
        self.linear = nn.Linear(config.time_embed_dim, config.num_layers * self.VECTORS * config.inner_dim)

    def forward(self, emb_BE: Tensor) -> Tensor:
        """Returns ``mod_BL12D``."""
        return self.linear(F.silu(emb_BE)).unflatten(1, (self.num_layers, self.VECTORS, -1))


class Modulate(NamedTuple):
    """Shift, one plus scale, and gate of one half of a block: ``(B, S, D)`` per token, ``(B, 1, D)`` for all alike."""

    shift: Tensor
    scale_plus_1: Tensor
    gate: Tensor

    @classmethod
    def of_kinds(cls, mod_B6D: Tensor) -> tuple[Modulate, Modulate]:
        """For text tokens the last three vectors, for video tokens the first three."""
        shift, scale, gate, text_shift, text_scale, text_gate = mod_B6D.unsqueeze(2).unbind(1)
        return cls(text_shift, 1 + text_scale, text_gate), cls(shift, 1 + scale, gate)

    @classmethod
    def select(cls, mod_B6D: Tensor, is_text_S1: Tensor) -> Modulate:
        """Per token. Not compiled, rows are copied, on the CPU in a fifth of the time of ``torch.where``."""
        if not is_traced():
            which_S = is_text_S1[:, 0].int()
            shift_B2D, scale_B2D, gate_B2D = mod_B6D.unflatten(1, (2, 3)).unbind(2)
            return cls(*(vectors.index_select(1, which_S) for vectors in (shift_B2D, 1 + scale_B2D, gate_B2D)))
        text, video = cls.of_kinds(mod_B6D)
        return cls(*(torch.where(is_text_S1, *vectors) for vectors in zip(text, video, strict=True)))

    def of_normed(self, normed_BSD: Tensor) -> Tensor:
        """Scaled and shifted."""
        return torch.addcmul(self.shift, normed_BSD, self.scale_plus_1)


def add_gated(gate: Tensor, x_BSD: Tensor, out_BSD: Tensor) -> Tensor:
    """``x + gate · out``."""
    return torch.addcmul(x_BSD, gate, out_BSD)


class ModulatedNorm(Part):
    """LayerNorm over D, then ``· (1 + scale) + shift``, in one half of a block."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm = _layer_norm(config)

    def forward(
        self, x_BSD: Tensor, mod_B6D: Tensor, is_text_S1: Tensor
    ) -> tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]:
        """The normed stream, and what adds to the stream what is computed from it, gated (``add_gated``).

        Shift and scale do not outlive the norm. Where gradients are taken and nothing is compiled, results are selected
        and not the vectors: autograd would keep one for each token of those, each of them as large as the stream.
        """
        if torch.is_grad_enabled() and not is_traced():
            text, video = Modulate.of_kinds(mod_B6D)
            normed_BSD = self.norm(x_BSD)
            return (
                torch.where(is_text_S1, text.of_normed(normed_BSD), video.of_normed(normed_BSD)),
                lambda x_BSD, out_BSD: torch.where(
                    is_text_S1, add_gated(text.gate, x_BSD, out_BSD), add_gated(video.gate, x_BSD, out_BSD)
                ),
            )
        modulate = Modulate.select(mod_B6D, is_text_S1)
        return modulate.of_normed(self.norm(x_BSD)), partial(add_gated, modulate.gate)


class FeedForward(Part):
    """Linear, activation, linear. ``net`` holds diffusers' members under diffusers' indices."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim, inner = config.inner_dim, 4 * config.inner_dim
        self.net = nn.ModuleList(
            [_Projection(config), nn.Dropout(config.dropout), nn.Linear(inner, dim), nn.Dropout(config.dropout)]
        )

    def forward(self, x_BSD: Tensor) -> Tensor:
        first, dropout, second, last_dropout = self.net
        return last_dropout(project(second, dropout(first(x_BSD))))


class _Projection(Part):
    """The feed-forward's first linear with its activation; gated ones have twice the rows, value first."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.activation_fn = config.activation_fn
        rows = 8 if config.activation_fn in ("geglu", "swiglu") else 4
        self.proj = nn.Linear(config.inner_dim, rows * config.inner_dim)

    def forward(self, x_BSD: Tensor) -> Tensor:
        if self.activation_fn == "gelu-approximate":
            return project(self.proj, x_BSD, gelu=True, reduced_next=True)
        x = project(self.proj, x_BSD)
        match self.activation_fn:
            case "gelu":
                return F.gelu(x)
            case "linear-silu":
                return F.silu(x)
            case "geglu-approximate":  # upstream's name for x · sigmoid(1.702 x), which has no gate
                return x * torch.sigmoid(1.702 * x)
            case "geglu":
                value, gate = x.chunk(2, dim=-1)
                return value * F.gelu(gate)
            case _:  # swiglu
                value, gate = x.chunk(2, dim=-1)
                return value * F.silu(gate)


class OutputNorm(Part):
    """The last norm, modulated by the timestep: shift, scale."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.time_embed_dim, 2 * config.inner_dim)
        self.norm = _layer_norm(config)

    def condition(self, emb_BE: Tensor) -> Tensor:
        """Shift, then scale: ``out_B2D``."""
        return self.linear(F.silu(emb_BE)).unflatten(1, (2, -1))

    def forward(self, x_BVD: Tensor, out_B2D: Tensor) -> Tensor:
        shift_B1D, scale_B1D = out_B2D.unsqueeze(2).unbind(1)
        return torch.addcmul(shift_B1D, self.norm(x_BVD), 1 + scale_B1D)


def _layer_norm(config: TransformerConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.inner_dim, config.norm_eps, config.norm_elementwise_affine)
