"""The whole CogVideoX transformer, as data sees it: embed, modulate, L blocks over one joint stream, head.

Equal to diffusers' ``CogVideoXTransformer3DModel`` (CogVideoX, arXiv:2408.06072), written for the compiler: text and
video stay one stream, no state, no branch on data, nothing in place.

Suffixes: B batch, F latent frames, C channels, H/W latent height/width, S joint tokens (text first), T text tokens,
V video tokens, E width of text or time embedding, D model width, N heads, K head width, L layers, P values of a patch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cogx_fast.config import TransformerConfig
from cogx_fast.model.attention import Mask, Rotary, RotaryNorm, attend
from cogx_fast.model.backends import get_backend
from cogx_fast.model.layers import (
    FeedForward,
    Modulate,
    ModulatedNorm,
    Modulation,
    OutputNorm,
    PatchEmbed,
    TimestepEmbedding,
    unpatchify,
)
from cogx_fast.model.masks import LayerBlocks, SparseBlocks
from cogx_fast.model.part import Part
from cogx_fast.model.products import project


class Attention(Part):
    """Self-attention with fused projections, normed and rotated queries and keys."""

    QK_NORM_EPS = 1e-6

    def __init__(self, config: TransformerConfig, backend: str) -> None:
        super().__init__()
        self.backend = get_backend(backend).name
        self.num_heads = config.num_attention_heads
        self.to_qkv = nn.Linear(config.inner_dim, 3 * config.inner_dim, bias=config.attention_bias)
        self.norm_q = RotaryNorm(config.attention_head_dim, self.QK_NORM_EPS)
        self.norm_k = RotaryNorm(config.attention_head_dim, self.QK_NORM_EPS)
        self.to_out = nn.ModuleList([nn.Linear(config.inner_dim, config.inner_dim)])

    def forward(self, x_BSD: Tensor, rotary: Rotary | None, mask: Mask | LayerBlocks) -> Tensor:
        if isinstance(mask, LayerBlocks):
            mask = mask.block_mask(x_BSD.shape[1])
        q_BSNK, k_BSNK, v_BSNK = self.project(x_BSD, rotary)
        out_BSNK = attend(q_BSNK, k_BSNK, v_BSNK, backend=self.backend, mask=mask)
        return project(self.to_out[0], out_BSNK.flatten(2), reduced_next=True)

    def project(self, x_BSD: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, normed and rotated, each ``(B, S, N, K)``."""
        q_BSNK, k_BSNK, v_BSNK = (
            project(self.to_qkv, x_BSD, reduced_next=True).unflatten(2, (3, self.num_heads, -1)).unbind(2)
        )
        return self.norm_q(q_BSNK, rotary), self.norm_k(k_BSNK, rotary), v_BSNK


class Block(Part):
    """Attention and feed-forward, each modulated, gated and added to the stream."""

    def __init__(self, config: TransformerConfig, backend: str) -> None:
        super().__init__()
        self.norm1 = ModulatedNorm(config)
        self.attn1 = Attention(config, backend)
        self.norm2 = ModulatedNorm(config)
        self.ff = FeedForward(config)

    def forward(
        self,
        x_BSD: Tensor,
        mod_B12D: Tensor,
        is_text_S1: Tensor,
        rotary: Rotary | None,
        mask: Mask | LayerBlocks,
    ) -> Tensor:
        """One block.

        Args:
            x_BSD: the stream, text tokens first.
            mod_B12D: this block's modulation vectors (``layers.Modulation``).
            is_text_S1: True for text tokens; all that a block knows of where the text ends.
            rotary: ``(cos_SK, sin_SK)`` from ``tables.join_rotary``, or None.
            mask: for the attention backend, or None.

        Returns:
            The stream, ``x_BSD``.
        """
        modulate = Modulate.select(mod_B12D[:, :6], is_text_S1)
        x_BSD = torch.addcmul(x_BSD, modulate.gate, self.attn1(self.norm1(x_BSD, modulate), rotary, mask))
        modulate = Modulate.select(mod_B12D[:, 6:], is_text_S1)
        return torch.addcmul(x_BSD, modulate.gate, self.ff(self.norm2(x_BSD, modulate)))


def _checkpoint(block: nn.Module, *inputs: object) -> Tensor:
    x_BSD: Tensor = checkpoint(block, *inputs, use_reentrant=False)
    return x_BSD


class CogVideoXTransformer(Part):
    """The transformer that predicts noise (v-prediction) from noisy latents, text and timestep.

    Args:
        config: its sizes and options.
        attention: the attention backend, a name from ``backends.BACKENDS``.
    """

    def __init__(self, config: TransformerConfig, *, attention: str = "sdpa") -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(config)
        self.embedding_dropout = nn.Dropout(config.dropout)
        self.time_embedding = TimestepEmbedding(config, config.inner_dim, config.time_embed_dim)
        self.ofs_embedding: TimestepEmbedding | None = None
        if config.ofs_embed_dim is not None:
            self.ofs_embedding = TimestepEmbedding(config, config.ofs_embed_dim, config.ofs_embed_dim)
        self.modulation = Modulation(config)
        self.transformer_blocks = nn.ModuleList([Block(config, attention) for _ in range(config.num_layers)])
        self.norm_final = nn.LayerNorm(config.inner_dim, config.norm_eps, config.norm_elementwise_affine)
        self.norm_out = OutputNorm(config)
        self.proj_out = nn.Linear(
            config.inner_dim, config.out_channels * config.patch_size**2 * (config.patch_size_t or 1)
        )
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Callable[..., Tensor] | None = None  # diffusers' names for both

    def forward(
        self,
        latents_BFCHW: Tensor,
        text_BTE: Tensor,
        timestep_B: Tensor,
        ofs_B: Tensor | None = None,
        rotary: Rotary | None = None,
        position_1SD: Tensor | None = None,
        mask: Mask | SparseBlocks = None,
    ) -> Tensor:
        """Predict.

        Args:
            latents_BFCHW: noisy latents (with the image's behind them along C for image-to-video).
            text_BTE: the text encoder's output.
            timestep_B: diffusion timesteps, 0 to 1000.
            ofs_B: 1.5 image-to-video's offset, or None.
            rotary: ``(cos_SK, sin_SK)`` of the joint stream, fp32, or None.
            position_1SD: positions added to the joint stream, or None.
            mask: for the attention backend, or None; with ``SparseBlocks`` each layer has its own, and the video tokens
                stand in their order, in which the tables are, too.

        Returns:
            The prediction, ``(B, F, C_out, H, W)`` in the latents' dtype (H and W down to whole patches).
        """
        order_V, restore_V = mask.order if isinstance(mask, SparseBlocks) else (None, None)
        x_BSD, emb_BE, is_text_S1 = self.embed(latents_BFCHW, text_BTE, timestep_B, ofs_B, position_1SD, order_V)
        mod_BL12D = self.modulation(emb_BE)
        for layer, (block, mod_B12D) in enumerate(zip(self.transformer_blocks, mod_BL12D.unbind(1), strict=True)):
            own_mask = mask.of_layer(layer) if isinstance(mask, SparseBlocks) else mask
            if self.gradient_checkpointing and torch.is_grad_enabled():
                run = self._gradient_checkpointing_func or _checkpoint
                x_BSD = run(block, x_BSD, mod_B12D, is_text_S1, rotary, own_mask)
            else:
                x_BSD = block(x_BSD, mod_B12D, is_text_S1, rotary, own_mask)
        return self.head(x_BSD[:, text_BTE.shape[1] :], emb_BE, latents_BFCHW.shape, restore_V)

    def embed(
        self,
        latents_BFCHW: Tensor,
        text_BTE: Tensor,
        timestep_B: Tensor,
        ofs_B: Tensor | None,
        position_1SD: Tensor | None,
        order_V: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The stream before the first block ``x_BSD``, the time embedding ``emb_BE`` and ``is_text_S1``."""
        emb_BE = self.time_embedding(timestep_B, latents_BFCHW.dtype)
        if self.ofs_embedding is not None and ofs_B is not None:
            emb_BE = emb_BE + self.ofs_embedding(ofs_B, latents_BFCHW.dtype)
        x_BSD = self.embedding_dropout(self.patch_embed(latents_BFCHW, text_BTE, position_1SD, order_V))
        is_text_S1 = torch.arange(x_BSD.shape[1], device=x_BSD.device)[:, None] < text_BTE.shape[1]
        return x_BSD, emb_BE, is_text_S1

    def head(self, x_BVD: Tensor, emb_BE: Tensor, latents_shape: torch.Size, restore_V: Tensor | None = None) -> Tensor:
        """Video tokens to the prediction; ``latents_shape`` is (B, F, C, H, W), ``restore_V`` undoes their order."""
        p, p_t = self.patch_embed.patch_size, self.patch_embed.patch_size_t
        grid = (latents_shape[1] // p_t, latents_shape[3] // p, latents_shape[4] // p)
        patches_BVP = self.proj_out(self.norm_out(self.norm_final(x_BVD), emb_BE))
        if restore_V is not None:
            patches_BVP = patches_BVP.index_select(1, restore_V)
        return unpatchify(patches_BVP, grid, p, p_t)
