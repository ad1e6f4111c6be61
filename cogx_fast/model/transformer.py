"""The CogVideoX transformer, as data sees it: begin, L blocks over one joint stream, head.

Equal to diffusers' ``CogVideoXTransformer3DModel`` (CogVideoX, arXiv:2408.06072), written for the compiler: text and
video stay one stream, no state, no branch on data, and nothing in place (uncompiled: on tensors just made). The loop
over the blocks is ``runtime.runner``'s.

Suffixes: B batch, F latent frames, C channels, H/W latent height/width, S joint tokens (text first), T text tokens,
V video tokens, E width of text or time embedding, D model width, N heads, K head width, L layers, P values of a patch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cogx_fast.attention.attend import Mask, Rotary, RotaryNorm, attend
from cogx_fast.attention.backends import get_backend
from cogx_fast.attention.exchange import Exchange
from cogx_fast.attention.masks import LayerBlocks, SparseBlocks
from cogx_fast.config import TransformerConfig
from cogx_fast.model.layers import (
    FeedForward,
    ModulatedNorm,
    Modulation,
    OutputNorm,
    PatchEmbed,
    TimestepEmbedding,
)
from cogx_fast.model.part import Part
from cogx_fast.model.products import project


class Attention(Part):
    """Self-attention with fused projections, normed and rotated queries and keys."""

    QK_NORM_EPS = 1e-6

    def __init__(self, config: TransformerConfig, backend: str) -> None:
        super().__init__()
        self.backend = get_backend(backend).name
        self.masked_backend: str | None = None  # for calls with a mask tensor, where the other was chosen without one
        self.num_heads = config.num_attention_heads
        self.to_qkv = nn.Linear(config.inner_dim, 3 * config.inner_dim, bias=config.attention_bias)
        self.norm_q = RotaryNorm(config.attention_head_dim, self.QK_NORM_EPS)
        self.norm_k = RotaryNorm(config.attention_head_dim, self.QK_NORM_EPS)
        self.to_out = nn.ModuleList([nn.Linear(config.inner_dim, config.inner_dim)])

    def forward(self, x_BSD: Tensor, rotary: Rotary | None, mask: Mask | LayerBlocks | Exchange) -> Tensor:
        q_BSNK, k_BSNK, v_BSNK = self.project(x_BSD, rotary)
        if isinstance(mask, Exchange):  # between here and there S is all tokens, and N this rank's heads
            out_BSNK = self.attend(*mask.to_heads(q_BSNK, k_BSNK, v_BSNK), mask.mask)
            out_BSNK = mask.to_tokens(out_BSNK, x_BSD.shape[1])
        else:
            out_BSNK = self.attend(q_BSNK, k_BSNK, v_BSNK, mask)
        return project(self.to_out[0], out_BSNK.flatten(2), reduced_next=True)

    def attend(self, q_BSNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor, mask: Mask | LayerBlocks | SparseBlocks) -> Tensor:
        """Attention itself, by this layer's backend."""
        assert not isinstance(mask, SparseBlocks), "a layer is given its own"
        if isinstance(mask, LayerBlocks):
            mask = mask.block_mask(q_BSNK.shape[1])
        backend = self.masked_backend if self.masked_backend and isinstance(mask, Tensor) else self.backend
        return attend(q_BSNK, k_BSNK, v_BSNK, backend=backend, mask=mask)

    def project(self, x_BSD: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, normed and rotated, each ``(B, S, N, K)``."""
        if self.is_split:
            joint_BS3D = torch.cat([project(each, x_BSD) for each in (self.to_q, self.to_k, self.to_v)], 2)
        else:
            joint_BS3D = project(self.to_qkv, x_BSD, reduced_next=True)
        q_BSNK, k_BSNK, v_BSNK = joint_BS3D.unflatten(2, (3, self.num_heads, -1)).unbind(2)
        return self.norm_q(q_BSNK, rotary), self.norm_k(k_BSNK, rotary), v_BSNK

    @property
    def is_split(self) -> bool:
        """Whether query, key and value are linears of their own."""
        return "to_q" in self._modules

    def split(self) -> None:
        """Have query, key and value as linears of their own, in the same memory, for adapters to stand around."""
        fused: Any = self._modules.pop("to_qkv")
        biases = (None,) * 3 if fused.bias is None else fused.bias.detach().chunk(3)
        for name, weight, bias in zip(("to_q", "to_k", "to_v"), fused.weight.detach().chunk(3), biases, strict=True):
            linear = nn.Linear(fused.in_features, fused.out_features // 3, bias=bias is not None, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=fused.weight.requires_grad)
            if bias is not None:
                linear.bias = nn.Parameter(bias, requires_grad=fused.bias.requires_grad)
            setattr(self, name, linear)

    def join(self) -> None:
        """Have one linear for the three again."""
        parts: list[Any] = [self._modules.pop(name) for name in ("to_q", "to_k", "to_v")]
        has_bias = parts[0].bias is not None
        self.to_qkv = nn.Linear(parts[0].in_features, 3 * parts[0].out_features, bias=has_bias, device="meta")
        for name in ("weight", "bias") if has_bias else ("weight",):
            several = [getattr(part, name) for part in parts]
            joined = nn.Parameter(torch.cat([each.detach() for each in several]), several[0].requires_grad)
            setattr(self.to_qkv, name, joined)


class Block(Part):
    """Attention and feed-forward, each modulated, gated and added to the stream.

    A block is called with what computes it, so that hooks on it run around compiled code as around its own.
    """

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
        mask: Mask | LayerBlocks | Exchange,
        compute: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """One block.

        Args:
            x_BSD: the stream, text tokens first.
            mod_B12D: this block's modulation vectors (``layers.Modulation``).
            is_text_S1: True for text tokens; all that a block knows of where the text ends.
            rotary: ``(cos_SK, sin_SK)`` from ``tables.join_rotary``, or None.
            mask: for the attention backend, or None; an ``Exchange`` where the tokens lie on several ranks.
            compute: called with the block and these in place of ``Block.compute``, e.g. that compiled.

        Returns:
            The stream, ``x_BSD``.
        """
        return (compute or Block.compute)(self, x_BSD, mod_B12D, is_text_S1, rotary, mask)

    def compute(
        self,
        x_BSD: Tensor,
        mod_B12D: Tensor,
        is_text_S1: Tensor,
        rotary: Rotary | None,
        mask: Mask | LayerBlocks | Exchange,
    ) -> Tensor:
        """As ``forward``, without what is attached to the block."""
        normed_BSD, add_gated = self.norm1(x_BSD, mod_B12D[:, :6], is_text_S1)
        x_BSD = add_gated(x_BSD, self.attn1(normed_BSD, rotary, mask))
        normed_BSD, add_gated = self.norm2(x_BSD, mod_B12D[:, 6:], is_text_S1)
        return add_gated(x_BSD, self.ff(normed_BSD))


class Conditioning(NamedTuple):
    """All that is computed from the timestep (and ofs)."""

    mod_BL12D: Tensor
    """Modulation vectors of every block (``layers.Modulation``)."""
    out_B2D: Tensor
    """Shift and scale of the output norm."""


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

    def condition(self, timestep_B: Tensor, ofs_B: Tensor | None, dtype: torch.dtype) -> Conditioning:
        """What the timestep decides: the one user of its embedding, of every block's modulation and the last norm's.

        Args:
            timestep_B: diffusion timesteps, 0 to 1000.
            ofs_B: 1.5 image-to-video's offset, or None.
            dtype: of the stream.
        """
        emb_BE = self.time_embedding(timestep_B, dtype)
        if self.ofs_embedding is not None and ofs_B is not None:
            emb_BE = emb_BE + self.ofs_embedding(ofs_B, dtype)
        return Conditioning(self.modulation(emb_BE), self.norm_out.condition(emb_BE))

    def begin(
        self,
        patches_BVP: Tensor,
        text_BTE: Tensor,
        timestep_B: Tensor,
        ofs_B: Tensor | None = None,
        position_1SD: Tensor | None = None,
        order_V: Tensor | None = None,
        conditioning: Conditioning | None = None,
    ) -> tuple[Tensor, Tensor, Conditioning]:
        """What stands before the first block.

        Args:
            patches_BVP: ``layers.patchify`` of the latents.
            text_BTE: the text encoder's output.
            timestep_B, ofs_B: as in ``condition``.
            position_1SD: positions added to the joint stream, or None.
            order_V: the order of the video tokens (``patterns.TokenOrder``), in which positions are, too; or None.
            conditioning: in place of what ``condition`` computes.

        Returns:
            The stream ``x_BSD``, ``is_text_S1`` (True for text tokens), and the conditioning.
        """
        if conditioning is None:
            conditioning = self.condition(timestep_B, ofs_B, patches_BVP.dtype)
        x_BSD = self.embedding_dropout(self.patch_embed(patches_BVP, text_BTE, position_1SD, order_V))
        is_text_S1 = torch.arange(x_BSD.shape[1], device=x_BSD.device)[:, None] < text_BTE.shape[1]
        return x_BSD, is_text_S1, conditioning

    def head(self, x_BVD: Tensor, out_B2D: Tensor) -> Tensor:
        """Video tokens to predicted patches ``patches_BVP``."""
        return self.proj_out(self.norm_out(self.norm_final(x_BVD), out_B2D))
