"""One block at the released widths, 2b's and 5b's, against upstream's ``CogVideoXBlock``: not toy widths alone."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from cogx_fast.config import PRESETS, TransformerConfig
from cogx_fast.model.layers import Modulation
from cogx_fast.model.tables import join_rotary, rotary_tables
from cogx_fast.model.transformer import Block
from tests.model.pairs import TOLERANCE
from tests.support import relative_error

GRID = (2, 6, 9)
TEXT_LEN = 92
VIDEO_LEN = 2 * 6 * 9


class Blocks(NamedTuple):
    config: TransformerConfig
    theirs: Any
    modulation: Modulation
    ours: Block
    video: Tensor
    text: Tensor
    emb: Tensor
    tables: tuple[Tensor, Tensor] | None


@pytest.fixture(scope="module", params=["2b", "5b"])
def blocks(request: pytest.FixtureRequest) -> Blocks:
    """Upstream's block and ours with its weights, and a stream whose values are as uneven as in the trained models."""
    from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock

    config = dataclasses.replace(PRESETS[request.param], num_layers=1)
    torch.manual_seed(0)
    theirs = CogVideoXBlock(
        config.inner_dim,
        config.num_attention_heads,
        config.attention_head_dim,
        config.time_embed_dim,
        attention_bias=True,
    )
    modulation, ours = Modulation(config), Block(config, "sdpa")
    state = theirs.state_dict()
    with torch.no_grad():
        for name, tensor in state.items():
            if name.startswith(("attn1.to_", "ff.")) and tensor.dim() == 2:
                tensor.mul_(3**0.5)
            elif tensor.dim() == 1:
                tensor.add_(0.1 * torch.randn_like(tensor))
        fused = {
            f"attn1.to_qkv.{part}": torch.cat([state[f"attn1.to_{x}.{part}"] for x in "qkv"])
            for part in ("weight", "bias")
        }
        for part in ("weight", "bias"):
            rows = [state[f"norm{n}.linear.{part}"] for n in (1, 2)]
            modulation.linear.get_parameter(part).copy_(torch.cat(rows))
    kept = {name: t for name, t in state.items() if ".linear." not in name and "to_q" not in name[:11]}
    kept = {name: t for name, t in kept.items() if not name.startswith(("attn1.to_k", "attn1.to_v"))}
    ours.load_state_dict(kept | fused, strict=True)
    outliers = torch.ones(config.inner_dim)
    outliers[::97] = 20.0
    video = torch.randn(1, VIDEO_LEN, config.inner_dim) * outliers
    text = torch.randn(1, TEXT_LEN, config.inner_dim) * outliers
    emb = torch.randn(1, config.time_embed_dim)
    rotary = config.use_rotary_positional_embeddings
    return Blocks(config, theirs, modulation, ours, video, text, emb, rotary_tables(config, GRID) if rotary else None)


def run_theirs(blocks: Blocks, dtype: torch.dtype, video: Tensor, text: Tensor) -> Tensor:
    """The joint stream after upstream's block, text first."""
    theirs = blocks.theirs.to(dtype)
    video, text = theirs(video.to(dtype), text.to(dtype), blocks.emb.to(dtype), image_rotary_emb=blocks.tables)
    return torch.cat([text, video], dim=1)


def run_ours(blocks: Blocks, dtype: torch.dtype, video: Tensor, text: Tensor) -> Tensor:
    ours, modulation = blocks.ours.to(dtype), blocks.modulation.to(dtype)
    rotary = None if blocks.tables is None else join_rotary(*blocks.tables, text_len=text.shape[1])
    x = torch.cat([text, video], dim=1).to(dtype)
    is_text = torch.arange(x.shape[1])[:, None] < text.shape[1]
    return ours(x, modulation(blocks.emb.to(dtype))[:, 0], is_text, rotary, None)


def test_block_of_full_width_in_fp32_with_gradients(blocks: Blocks) -> None:
    weights = torch.randn(1, TEXT_LEN + VIDEO_LEN, blocks.config.inner_dim)
    outputs, inputs = [], []
    for run in (run_theirs, run_ours):
        video, text = blocks.video.clone().requires_grad_(), blocks.text.clone().requires_grad_()
        outputs.append(run(blocks, torch.float32, video, text))
        (outputs[-1] * weights).sum().backward()
        inputs.append((video.grad, text.grad))
    assert relative_error(outputs[1].detach(), outputs[0].detach()) <= TOLERANCE
    # what the block itself adds is compared too: the stream it adds to is larger
    stream = torch.cat([blocks.text, blocks.video], dim=1)
    assert relative_error(outputs[1].detach() - stream, outputs[0].detach() - stream) <= TOLERANCE
    for our_gradient, their_gradient in zip(inputs[1], inputs[0], strict=True):
        assert relative_error(our_gradient, their_gradient) <= TOLERANCE

    theirs = {name: p.grad for name, p in blocks.theirs.named_parameters()}
    ours = {name: p.grad for name, p in blocks.ours.named_parameters()}
    errors = {}
    for part in ("weight", "bias"):
        expected = torch.cat([theirs.pop(f"norm{n}.linear.{part}") for n in (1, 2)])
        errors[f"modulation.{part}"] = relative_error(getattr(blocks.modulation.linear, part).grad, expected)
        expected = torch.cat([theirs.pop(f"attn1.to_{x}.{part}") for x in "qkv"])
        errors[f"to_qkv.{part}"] = relative_error(ours.pop(f"attn1.to_qkv.{part}"), expected)
    assert theirs.keys() == ours.keys()
    for name, expected in theirs.items():
        scale = 1.0
        if name == "attn1.norm_k.bias" and blocks.tables is None:  # 0 but for rounding: see test_gradients
            scale = (expected.norm() / theirs["attn1.norm_q.bias"].norm()).item()
        errors[name] = relative_error(ours[name], expected) * scale
    assert {name: error for name, error in errors.items() if not error <= TOLERANCE} == {}
    blocks.theirs.zero_grad(), blocks.ours.zero_grad(), blocks.modulation.zero_grad()


def test_block_of_full_width_rounds_no_more_than_upstream_in_bf16(blocks: Blocks) -> None:
    """Weights and inputs are rounded first, so that what is compared is the rounding inside the block alone.

    The first 40 of the tokens are 80,000 values and more, and a processor without bf16 takes its time for each.
    """
    dtype = torch.bfloat16
    tables = None if blocks.tables is None else tuple(table[:27] for table in blocks.tables)
    first = {"video": blocks.video[:, :27], "text": blocks.text[:, :13], "emb": blocks.emb}
    blocks = blocks._replace(**{name: x.to(dtype).float() for name, x in first.items()}, tables=tables)
    with torch.no_grad():
        theirs = run_theirs(blocks, dtype, blocks.video, blocks.text)
        ours = run_ours(blocks, dtype, blocks.video, blocks.text)
        exact = run_theirs(blocks, torch.float32, blocks.video, blocks.text)
        assert relative_error(run_ours(blocks, torch.float32, blocks.video, blocks.text), exact) <= TOLERANCE
    assert ours.dtype == dtype
    assert relative_error(ours, exact) <= 1.05 * relative_error(theirs, exact)
    stream = torch.cat([blocks.text, blocks.video], dim=1)
    assert relative_error(ours - stream, exact - stream) <= 1.05 * relative_error(theirs - stream, exact - stream)
