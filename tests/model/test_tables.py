"""Position tables are the very numbers that upstream computes, at the released models' real sizes and at others."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from cogx_fast.config import PRESETS, TransformerConfig
from cogx_fast.model.tables import join_rotary, rotary_tables, sincos_table
from tests.cases import for_each
from tests.support import pipeline_rotary

# latent frames, height, width: the released sizes, then others that the pipelines take
REAL = [("5b", (13, 60, 90)), ("5b-i2v", (13, 60, 90)), ("1.5-5b", (22, 96, 170)), ("1.5-5b-i2v", (22, 96, 170))]
OTHER = [
    ("5b", (13, 90, 60)), ("5b", (1, 2, 2)), ("5b", (3, 61, 91)), ("5b", (13, 96, 170)), ("5b", (7, 2, 90)),
    ("5b", (7, 60, 2)), ("5b", (25, 34, 62)), ("1.5-5b", (2, 2, 2)), ("1.5-5b", (42, 170, 96)),
    ("1.5-5b", (8, 300, 300)),
]  # fmt: skip


def upstream_rotary(config: TransformerConfig, sizes: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    frames, height, width = sizes
    tables = pipeline_rotary(config, torch.empty(1, frames, 1, height, width))
    assert tables is not None
    return tables


@for_each("name, sizes", REAL + OTHER)
def test_rotary_tables_are_those_the_pipeline_gives(name: str, sizes: Any) -> None:
    config = PRESETS[name]
    ours = rotary_tables(config, config.grid(*sizes))
    theirs = upstream_rotary(config, sizes)
    for our_table, their_table in zip(ours, theirs, strict=True):
        assert our_table.dtype == their_table.dtype == torch.float32
        torch.testing.assert_close(our_table, their_table, rtol=0, atol=0)


def test_rotary_tables_have_a_row_for_each_token_of_the_released_videos() -> None:
    assert [table.shape for table in rotary_tables(PRESETS["5b"], (13, 30, 45))] == [(17_550, 64)] * 2
    assert [table.shape for table in rotary_tables(PRESETS["1.5-5b"], (11, 48, 85))] == [(44_880, 64)] * 2


@for_each("head_dim", [16, 32, 48, 128])
def test_rotary_tables_of_other_head_widths(head_dim: int) -> None:
    for name in ("5b", "1.5-5b"):
        config = dataclasses.replace(PRESETS[name], attention_head_dim=head_dim, sample_height=20, sample_width=34)
        sizes = (4, 18, 26)
        for our_table, their_table in zip(
            rotary_tables(config, config.grid(*sizes)), upstream_rotary(config, sizes), strict=True
        ):
            torch.testing.assert_close(our_table, their_table, rtol=0, atol=0)


def test_joined_tables_leave_text_as_it_is_and_carry_the_sign_of_each_pair() -> None:
    cos, sin = rotary_tables(PRESETS["5b"], (2, 3, 5))
    joint_cos, joint_sin = join_rotary(cos, sin, text_len=7)
    assert joint_cos.shape == joint_sin.shape == (7 + 30, 64)
    assert (joint_cos[:7] == 1).all()
    assert (joint_sin[:7] == 0).all()
    torch.testing.assert_close(joint_cos[7:], cos, rtol=0, atol=0)
    torch.testing.assert_close(joint_sin[7:, 0::2], -sin[:, 0::2], rtol=0, atol=0)
    torch.testing.assert_close(joint_sin[7:, 1::2], sin[:, 1::2], rtol=0, atol=0)
    assert all(table.dtype == torch.float32 for table in join_rotary(cos.bfloat16(), sin.double(), text_len=0))


def upstream_sincos(config: TransformerConfig, sizes: tuple[int, int, int]) -> Tensor:
    """By the method of upstream's patch embedding, video rows only."""
    from types import SimpleNamespace

    from diffusers.models.embeddings import CogVideoXPatchEmbed

    embed = SimpleNamespace(**config, embed_dim=config.inner_dim)
    frames, height, width = sizes
    pre_compression = (frames - 1) * config.temporal_compression_ratio + 1
    table = CogVideoXPatchEmbed._get_positional_embeddings(embed, height, width, pre_compression)
    assert (table[:, : config.max_text_seq_length] == 0).all()
    return table[0, config.max_text_seq_length :]


SINCOS = [
    *({"sizes": sizes} for sizes in [(13, 60, 90), (13, 90, 60), (1, 2, 2), (3, 61, 91), (25, 34, 62)]),
    {"spatial_interpolation_scale": 0.7}, {"temporal_interpolation_scale": 3.0},
    {"num_attention_heads": 1, "attention_head_dim": 16},
]  # fmt: skip


@for_each("changes", SINCOS)
def test_sincos_table_is_upstreams(changes: dict[str, Any]) -> None:
    changes = {"sizes": (5, 12, 20)} | changes
    sizes = changes.pop("sizes")
    config = dataclasses.replace(PRESETS["2b"], **changes)
    ours, theirs = sincos_table(config, config.grid(*sizes)), upstream_sincos(config, sizes)
    assert ours.dtype == theirs.dtype == torch.float64
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_tables_are_made_where_they_are_asked_for() -> None:
    meta = torch.device("meta")
    assert all(table.is_meta for table in rotary_tables(PRESETS["5b"], (2, 3, 5), meta))
    assert all(table.is_meta for table in rotary_tables(PRESETS["1.5-5b"], (2, 3, 5), meta))
    assert all(t.is_meta for t in join_rotary(*rotary_tables(PRESETS["5b"], (2, 3, 5), meta), text_len=4))
    assert sincos_table(PRESETS["2b"], (2, 3, 5), meta).is_meta
