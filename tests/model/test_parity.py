"""Our output is upstream's, in fp32: every released variant, in every shape and with every kind of input it takes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from tests.cases import for_each
from tests.model.pairs import ADDED_POSITIONS, CONVOLVED, TOLERANCE, Pair, call, pair
from tests.support import RELEASED, inputs, pipeline_rotary, relative_error

WITHOUT_ADDED = tuple(name for name in RELEASED if name not in ADDED_POSITIONS)
ROTARY = tuple(name for name in RELEASED if name != "2b")

SIZES: dict[str, dict[str, int]] = {
    "its-own": {},
    "3x5-patches": {"height": 6, "width": 10},
    "5x3-patches": {"height": 10, "width": 6},
    "one-patch": {"height": 2, "width": 2},
    "wider-than-its-own": {"height": 8, "width": 26},
    "taller-than-its-own": {"height": 22, "width": 4},
    "two-frames": {"frames": 2},
    "more-frames": {"frames": 6},
    "odd-rows": {"height": 7, "width": 10},
    "odd-rows-and-columns": {"height": 13, "width": 11},
    "odd-frames": {"frames": 3},
}
ONLY_CONVOLVED = ("odd-rows", "odd-rows-and-columns", "odd-frames")  # 1.5 takes whole patches, as upstream does
CASES = [(name, size) for name in RELEASED for size in SIZES if name in CONVOLVED or size not in ONLY_CONVOLVED]


def pair_for(name: str, size: dict[str, int]) -> Pair:
    """The variant, made for that size where it is bound to one: learned positions are, and 1.5's tables end with it."""
    if name in ("2b", "5b"):
        return pair(name)
    return pair(name, **{f"sample_{side}": size[side] for side in ("height", "width") if side in size})


@for_each("batch", [1, 2], "name, size", CASES)
def test_output_equals_upstream_with_and_without_given_tables(name: str, size: str, batch: int) -> None:
    both = pair_for(name, SIZES[size])
    arguments = inputs(both.config, batch=batch, **SIZES[size])
    tables = pipeline_rotary(both.config, arguments["hidden_states"])
    with torch.no_grad():
        expected = both.theirs(**arguments, image_rotary_emb=tables).sample
        given = both.ours(**arguments, image_rotary_emb=tables).sample
        built = both.ours(**arguments).sample
    assert relative_error(given, expected) <= TOLERANCE
    assert relative_error(built, expected) <= TOLERANCE


@for_each("name", RELEASED)
def test_the_comparison_would_notice_rotation_attention_and_text(name: str) -> None:
    theirs = pair(name).theirs
    arguments = call(pair(name).config)
    silent = copy.deepcopy(theirs)
    for block in silent.transformer_blocks:
        block.attn1.to_out[0].weight.data.zero_()
    with torch.no_grad():
        expected = theirs(**arguments).sample
        without_text = theirs(**arguments | {"encoder_hidden_states": 0 * arguments["encoder_hidden_states"]}).sample
        assert relative_error(silent(**arguments).sample, expected) > 0.02
        assert relative_error(without_text, expected) > 0.01
        if arguments["image_rotary_emb"] is not None:
            assert relative_error(theirs(**arguments | {"image_rotary_emb": None}).sample, expected) > 0.02


@for_each("text_len", [1, 5, 11], "name", WITHOUT_ADDED)
def test_text_shorter_and_longer_than_the_maximum_where_no_position_is_added(name: str, text_len: int) -> None:
    assert pair(name).error(call(pair(name).config, text_len=text_len)) <= TOLERANCE


@for_each("height", [12, 8], "name", ADDED_POSITIONS)
def test_shorter_text_keeps_the_first_text_positions_where_positions_are_added(name: str, height: int) -> None:
    """Upstream cannot run it: its joint table is cut by hand, text rows from the end of the text's part."""
    text_len = 5
    both = pair(name) if name == "2b" else pair(name, sample_height=height)
    theirs = copy.deepcopy(both.theirs)
    embed, longest = theirs.patch_embed, both.config.max_text_seq_length
    embed.pos_embedding = torch.cat([embed.pos_embedding[:, :text_len], embed.pos_embedding[:, longest:]], dim=1)
    embed.max_text_seq_length = text_len
    arguments = call(both.config, text_len=text_len, height=height)
    with torch.no_grad():
        assert relative_error(both.ours(**arguments).sample, theirs(**arguments).sample) <= TOLERANCE


def test_learned_positions_give_way_to_sincos_ones_for_another_number_of_frames() -> None:
    both = pair("5b-i2v")
    assert both.error(call(both.config, frames=3)) <= TOLERANCE
    assert not both.theirs.patch_embed.pos_embedding.eq(0).all()


@for_each("name", RELEASED, "dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_any_given_tables_are_honoured(name: str, dtype: torch.dtype) -> None:
    """Also tables of no rotation, where the two channels of a pair differ, and in a model without rotary positions."""
    both = pair(name)
    arguments = inputs(both.config)
    grid = both.config.grid(*(arguments["hidden_states"].shape[i] for i in (1, 3, 4)))
    generator = torch.Generator().manual_seed(3)
    cos, sin = torch.randn(2, grid[0] * grid[1] * grid[2], 64, generator=generator).to(dtype)
    assert both.error(arguments, image_rotary_emb=(cos, sin)) <= TOLERANCE
    assert both.error(arguments, image_rotary_emb=[cos, sin]) <= TOLERANCE


@for_each("name", ROTARY)
def test_identity_tables_are_upstreams_none_and_none_is_not(name: str) -> None:
    both = pair(name)
    arguments = call(both.config)
    cos, sin = arguments.pop("image_rotary_emb")
    with torch.no_grad():
        unrotated = both.theirs(**arguments).sample
        identity = both.ours(**arguments, image_rotary_emb=(torch.ones_like(cos), torch.zeros_like(sin))).sample
        assert relative_error(identity, unrotated) <= TOLERANCE
        assert relative_error(both.ours(**arguments).sample, unrotated) > 0.02


@pytest.mark.parametrize("name", ["1.5-5b", "1.5-5b-i2v"])
def test_frames_padded_as_the_pipelines_pad_them(name: str) -> None:
    both = pair(name)
    arguments = inputs(both.config, frames=5)
    with pytest.raises(ValueError, match=r"latent frames is 5.*pad it to 6"):
        both.ours(**arguments)
    latents = arguments["hidden_states"]
    padded = torch.cat([latents, latents.new_zeros(latents.shape[0], 1, *latents.shape[2:])], dim=1)
    tables = pipeline_rotary(both.config, padded)
    assert both.error(arguments | {"hidden_states": padded}, image_rotary_emb=tables) <= TOLERANCE


TIMESTEPS = [
    7, 7.5, torch.tensor(7), torch.tensor([7]), torch.tensor([7, 901]), torch.tensor([0.25, 999.5]),
    torch.tensor([7, 901], dtype=torch.int32), torch.tensor([7.0, 640.0], dtype=torch.bfloat16),
    torch.tensor([7.25], dtype=torch.float64),
]  # fmt: skip


@for_each("timestep", TIMESTEPS)
def test_every_kind_of_timestep(timestep: Any) -> None:
    both = pair("5b")
    arguments = call(both.config)
    with torch.no_grad():
        ours = both.ours(**arguments | {"timestep": timestep}).sample
        # upstream takes one dimension only
        theirs = both.theirs(**arguments | {"timestep": torch.as_tensor(timestep).reshape(-1)}).sample
    assert relative_error(ours, theirs) <= TOLERANCE


@for_each("ofs", [2, 2.0, torch.tensor(2.0), torch.tensor([2.0]), torch.tensor([2.0, 5.0])])
def test_every_kind_of_ofs(ofs: Any) -> None:
    both = pair("1.5-5b-i2v")
    arguments = call(both.config)
    with torch.no_grad():
        ours = both.ours(**arguments | {"ofs": ofs}).sample
        theirs = both.theirs(**arguments | {"ofs": torch.as_tensor(ofs).reshape(-1)}).sample
        other = both.theirs(**arguments | {"ofs": torch.tensor([700.0])}).sample
    assert relative_error(ours, theirs) <= TOLERANCE
    assert relative_error(other, theirs) > 1e-3


def test_ofs_is_ignored_by_models_without_it() -> None:
    both = pair("1.5-5b")
    arguments = call(both.config)
    with torch.no_grad():
        torch.testing.assert_close(both.ours(**arguments, ofs=2.0), both.ours(**arguments), rtol=0, atol=0)


@for_each("name", RELEASED)
def test_inputs_are_read_through_any_strides_and_left_as_they_were(name: str) -> None:
    both = pair(name)
    arguments = call(both.config)
    channels_first = arguments["hidden_states"].transpose(1, 2).contiguous().transpose(1, 2)
    text = arguments["encoder_hidden_states"].transpose(1, 2).contiguous().transpose(1, 2)
    strided = arguments | {"hidden_states": channels_first, "encoder_hidden_states": text}
    before = copy.deepcopy(strided)
    assert both.error(strided) <= TOLERANCE
    torch.testing.assert_close(strided, before, rtol=0, atol=0)


def test_one_model_serves_changing_sizes_texts_and_batches_in_any_order() -> None:
    """Held tables are looked up by all that they depend on."""
    both = pair("2b")
    for _ in range(2):
        for height, width, frames, batch in [
            (12, 10, 4, 1),
            (10, 12, 4, 2),
            (12, 10, 3, 1),
            (6, 10, 8, 1),
            (12, 5, 8, 1),
        ]:
            sizes = {"height": height, "width": width, "frames": frames, "batch": batch}
            assert both.error(call(both.config, **sizes)) <= TOLERANCE
    both = pair("5b")
    for text_len, height, width in [(8, 12, 10), (5, 12, 10), (8, 10, 12), (5, 10, 12)] * 2:
        arguments = inputs(both.config, text_len=text_len, height=height, width=width)
        tables = pipeline_rotary(both.config, arguments["hidden_states"])
        with torch.no_grad():
            expected = both.theirs(**arguments, image_rotary_emb=tables).sample
            assert relative_error(both.ours(**arguments).sample, expected) <= TOLERANCE
