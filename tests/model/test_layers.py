"""The parts around attention, each against upstream's part of the same name."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from cogx_fast.config import FEED_FORWARD_ACTIVATIONS, TransformerConfig
from cogx_fast.model.layers import (
    FeedForward,
    ModulatedNorm,
    Modulation,
    OutputNorm,
    PatchEmbed,
    TimestepEmbedding,
    patchify,
    timestep_frequencies,
    unpatchify,
)
from tests.cases import for_each
from tests.model.pairs import TOLERANCE
from tests.support import relative_error, small


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@for_each("flip", [True, False], "freq_shift", [0, 1, 5], "dim", [1, 2, 33, 64, 3072])
def test_timestep_frequencies_are_upstreams(dim: int, freq_shift: int, flip: bool) -> None:
    from diffusers.models.embeddings import get_timestep_embedding

    if 0 < dim // 2 <= freq_shift:
        freq_shift = 0
    timestep = torch.tensor([0, 1, 500, 999.5, 1000])
    ours = timestep_frequencies(timestep, dim, flip, freq_shift)
    theirs = get_timestep_embedding(timestep, dim, flip_sin_to_cos=flip, downscale_freq_shift=freq_shift)
    assert ours.dtype == torch.float32
    # A last-bit difference in a frequency is multiplied by the timestep: 1000 times fp32's rounding.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert relative_error(ours, theirs) <= TOLERANCE or dim == 1


@for_each("p_t", [None, 1, 2, 3], "p", [1, 2, 3])
def test_unpatchify_turns_back_what_patch_embed_takes_apart(p: int, p_t: int | None) -> None:
    """With the identity as projection: each patch holds the (C, p_t, p, p) values of its place."""
    channels, grid = 5, (2, 3, 4)
    values = channels * (p_t or 1) * p * p
    heads = math.ceil(values / 16)
    config = small(
        "5b", patch_size=p, patch_size_t=p_t, in_channels=channels, num_attention_heads=heads, attention_head_dim=16
    )
    embed = PatchEmbed(config)
    with torch.no_grad():
        embed.proj.bias.zero_()
        embed.proj.weight.copy_(torch.eye(config.inner_dim, values))
        latents = randn(2, grid[0] * (p_t or 1), channels, grid[1] * p, grid[2] * p)
        x = embed(patchify(latents, p, p_t or 1), torch.zeros(2, 3, config.text_embed_dim), None)
    patches = x[:, 3:, :values]
    assert torch.equal(unpatchify(patches, latents.shape, p, p_t or 1), latents)
    first = latents[0, : (p_t or 1), :, :p, :p].transpose(0, 1).flatten()
    assert torch.equal(patches[0, 0], first)


def test_patches_are_upstreams_convolution_and_leave_half_patches_out() -> None:
    from diffusers.models.embeddings import CogVideoXPatchEmbed

    for name in ("2b", "5b", "1.5-5b"):
        config = small(name)
        theirs = CogVideoXPatchEmbed(
            config.patch_size, config.patch_size_t, config.in_channels, config.inner_dim, config.text_embed_dim,
            use_positional_embeddings=False, use_learned_positional_embeddings=False,
        )  # fmt: skip
        ours = PatchEmbed(small(name, patch_bias=True))
        ours.load_state_dict(
            {key: value.reshape(dict(ours.named_parameters())[key].shape) for key, value in theirs.state_dict().items()}
        )
        latents, text = randn(2, 4, config.in_channels, 7, 9)[..., : 8 if config.patch_size_t else 9], randn(2, 3, 32)
        latents = latents[..., :6, :] if config.patch_size_t else latents
        patches = patchify(latents, config.patch_size, config.patch_size_t or 1)
        with torch.no_grad():
            assert relative_error(ours(patches, text, None), theirs(text, latents)) <= TOLERANCE


@for_each("activation", FEED_FORWARD_ACTIVATIONS)
def test_feed_forward_is_upstreams(activation: str) -> None:
    from diffusers.models.attention import FeedForward as Theirs

    config = small("5b", activation_fn=activation)
    theirs, ours = Theirs(config.inner_dim, activation_fn=activation, final_dropout=True), FeedForward(config)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = 3 * randn(2, 9, config.inner_dim)
    with torch.no_grad():
        assert relative_error(ours(x), theirs(x)) <= TOLERANCE


@pytest.mark.parametrize("affine", [True, False])
def test_modulated_norm_is_upstreams_norm_zero_on_a_joint_stream(affine: bool) -> None:
    from diffusers.models.normalization import CogVideoXLayerNormZero

    config = small("5b", norm_elementwise_affine=affine, num_layers=2)
    dim, text_len = config.inner_dim, 3
    norms = [CogVideoXLayerNormZero(config.time_embed_dim, dim, affine, config.norm_eps) for _ in range(4)]
    modulation, ours = Modulation(config), ModulatedNorm(config)
    x, emb = randn(2, 10, dim), randn(2, config.time_embed_dim, seed=1)
    is_text = torch.arange(10)[:, None] < text_len
    with torch.no_grad():
        modulation.linear.weight.copy_(torch.cat([norm.linear.weight for norm in norms]))
        modulation.linear.bias.copy_(torch.cat([norm.linear.bias for norm in norms]))
        vectors = modulation(emb)
        assert vectors.shape == (2, config.num_layers, Modulation.VECTORS, dim)
        for index, norm in enumerate(norms):
            layer, half = divmod(index, 2)
            ours.load_state_dict({key: value for key, value in norm.state_dict().items() if key.startswith("norm.")})
            video, text, gate, text_gate = norm(x[:, text_len:], x[:, :text_len], emb)
            normed, add_gated = ours(x, vectors[:, layer, 6 * half : 6 * half + 6], is_text)
            assert relative_error(normed, torch.cat([text, video], dim=1)) <= TOLERANCE
            gates = torch.cat([text_gate.expand(-1, text_len, -1), gate.expand(-1, 10 - text_len, -1)], dim=1)
            assert relative_error(add_gated(x, normed), x + gates * normed) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_modulation_is_the_same_with_gradients_which_keep_no_vector_for_each_token(dtype: torch.dtype) -> None:
    """Bit for bit, whether vectors are selected or results; autograd keeps the norm's input, its result and a value."""
    generator = torch.Generator().manual_seed(0)
    norm = ModulatedNorm(small("5b")).to(dtype)
    width = small("5b").inner_dim
    x, y, vectors = (torch.randn(2, n, width, generator=generator).to(dtype) for n in (10, 10, 6))
    is_text = torch.arange(10)[:, None] < 4
    with torch.no_grad():
        normed, add_gated = norm(x, vectors, is_text)
        plain = normed, add_gated(x, y)
    kept: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    inputs = [each.clone().requires_grad_() for each in (x, vectors, y)]
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        normed, add_gated = norm(inputs[0], inputs[1], is_text)
        assert torch.equal(normed, plain[0])
        assert torch.equal(add_gated(inputs[0], inputs[2]), plain[1])
    stream = x.numel() * x.element_size()
    assert sum(storage.nbytes() for storage in kept.values() if storage.nbytes() >= stream) == 3 * stream


def test_output_norm_is_upstreams() -> None:
    from diffusers.models.normalization import AdaLayerNorm

    config = small("5b")
    dim = config.inner_dim
    theirs = AdaLayerNorm(
        config.time_embed_dim, output_dim=2 * dim, norm_elementwise_affine=True, norm_eps=config.norm_eps, chunk_dim=1
    )
    ours = OutputNorm(config)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x, emb = randn(2, 7, dim), randn(2, config.time_embed_dim, seed=1)
    with torch.no_grad():
        assert relative_error(ours(x, ours.condition(emb)), theirs(x, temb=emb)) <= TOLERANCE


def test_timestep_embedding_takes_the_dtype_of_the_latents() -> None:
    config: TransformerConfig = small("5b")
    embedding = TimestepEmbedding(config, config.inner_dim, config.time_embed_dim)
    timestep = torch.tensor([7, 900])
    with torch.no_grad():
        exact = embedding(timestep, torch.float32)
        rounded = embedding.bfloat16()(timestep, torch.bfloat16)
    assert exact.dtype == torch.float32
    assert rounded.dtype == torch.bfloat16
    assert relative_error(rounded, exact) < 0.02
