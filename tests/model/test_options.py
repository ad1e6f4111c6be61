"""Every option of upstream's configuration and of its call, beyond what the released models use."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from cogx_fast.attention.backends import BACKENDS
from cogx_fast.config import FEED_FORWARD_ACTIVATIONS, TIMESTEP_ACTIVATIONS
from cogx_fast.runtime.module import CogVideoXModel
from tests.cases import for_each
from tests.model.pairs import TOLERANCE, call, new_pair, pair, with_tables
from tests.support import relative_error, small

OPTIONS: list[tuple[str, dict[str, Any]]] = [
    *(("5b", {"activation_fn": name}) for name in FEED_FORWARD_ACTIVATIONS),
    *(("1.5-5b-i2v", {"timestep_activation_fn": name}) for name in TIMESTEP_ACTIVATIONS),
    ("2b", {"timestep_activation_fn": "SiLU"}),
    ("2b", {"timestep_activation_fn": "MISH"}),
    ("2b", {"attention_bias": False}),
    ("5b", {"attention_bias": False}),
    ("2b", {"patch_bias": False}),
    ("1.5-5b", {"patch_bias": True}),
    ("5b", {"norm_elementwise_affine": False}),
    ("5b", {"norm_eps": 0.3}),
    ("5b", {"norm_eps": 0}),
    ("5b", {"flip_sin_to_cos": False}),
    ("1.5-5b-i2v", {"flip_sin_to_cos": False, "freq_shift": 1}),
    ("5b", {"freq_shift": 1}),
    ("5b", {"freq_shift": 7}),
    ("5b", {"time_embed_dim": 33}),
    ("1.5-5b-i2v", {"time_embed_dim": 33, "ofs_embed_dim": 33}),
    ("1.5-5b-i2v", {"time_embed_dim": 1, "ofs_embed_dim": 1}),
    ("5b", {"ofs_embed_dim": 48}),
    ("5b", {"ofs_embed_dim": 0}),
    ("2b", {"spatial_interpolation_scale": 0.7, "temporal_interpolation_scale": 3}),
    ("2b", {"num_attention_heads": 16, "attention_head_dim": 1}),
    ("2b", {"num_attention_heads": 3, "attention_head_dim": 80}),
    ("5b", {"num_attention_heads": 1, "attention_head_dim": 16}),
    ("5b", {"num_attention_heads": 5, "attention_head_dim": 48}),
    ("1.5-5b", {"num_attention_heads": 3, "attention_head_dim": 128}),
    ("5b", {"patch_size": 1}),
    ("5b", {"patch_size": 3, "sample_height": 13, "sample_width": 11}),
    ("2b", {"patch_size": 4, "sample_height": 13, "sample_width": 11}),
    ("1.5-5b", {"patch_size": 1}),
    ("1.5-5b", {"patch_size_t": 1}),
    ("1.5-5b", {"patch_size_t": 4}),
    ("2b", {"patch_size_t": 1}),
    ("5b-i2v", {"patch_size_t": 1}),
    ("5b-i2v", {"sample_height": 13, "sample_width": 11}),
    ("5b-i2v", {"sample_frames": 15}),
    ("2b", {"temporal_compression_ratio": 8, "sample_frames": 25}),
    ("5b", {"in_channels": 5, "out_channels": 3}),
    ("1.5-5b", {"in_channels": 3, "out_channels": 5}),
    ("5b", {"num_layers": 1}),
    ("5b", {"num_layers": 5}),
    ("5b", {"max_text_seq_length": 1, "text_embed_dim": 1}),
]


@for_each("name, changes", OPTIONS)
def test_output_equals_upstream_with_option(name: str, changes: dict[str, Any]) -> None:
    both = new_pair(small(name, **changes))
    arguments = call(both.config)
    assert both.error(arguments) <= TOLERANCE
    with torch.no_grad():
        built = both.ours(**arguments | {"image_rotary_emb": None}).sample
        assert relative_error(built, both.ours(**arguments).sample) <= TOLERANCE


def joint_masks(batch: int, heads: int, tokens: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = {
        "B,S": (batch, tokens),
        "B,1,S": (batch, 1, tokens),
        "B,S,S": (batch, tokens, tokens),
        "BN,1,S": (batch * heads, 1, tokens),
        "BN,S,S": (batch * heads, tokens, tokens),
        "B,1,S,S": (batch, 1, tokens, tokens),
    }
    masks = {}
    for name, shape in shapes.items():
        masks[f"{name} added"] = 3 * torch.randn(shape, generator=generator)
        masks[f"{name} boolean"] = torch.rand(shape, generator=generator) > 0.4
    return masks


@for_each("batch", [1, 2], "which", joint_masks(1, 1, 1))
def test_attention_mask_of_upstreams_shapes(which: str, batch: int) -> None:
    both = pair("5b")
    arguments = call(both.config, batch=batch)
    mask = joint_masks(batch, 2, 128)[which]
    assert both.error(arguments, attention_kwargs={"attention_mask": mask}) <= TOLERANCE
    with torch.no_grad():
        masked = both.ours(**arguments, attention_kwargs={"attention_mask": mask}).sample
        assert relative_error(masked, both.ours(**arguments).sample) > 1e-3


SHAPES = [(2, 127), (1, 128), (128, 128), (3, 128, 128), (128,), (2, 3, 128, 128), (2, 2, 1, 64, 2)]


@for_each("mask", [*map(torch.ones, SHAPES), torch.ones(2, 128, dtype=torch.long), [[1.0] * 128] * 2])
def test_attention_mask_of_another_shape_or_kind_is_refused(mask: Any) -> None:
    both = pair("5b")
    with pytest.raises(ValueError, match=r"attention_mask .* expected .* B = 2, N = 2, S = 128"):
        both.ours(**call(both.config), attention_kwargs={"attention_mask": mask})


def test_attention_kwargs_that_mean_nothing() -> None:
    both = pair("5b")
    arguments = call(both.config)
    with torch.no_grad():
        plain = both.ours(**arguments).sample
        assert torch.equal(both.ours(**arguments, attention_kwargs={"scale": 0.5}).sample, plain)
        assert torch.equal(both.ours(**arguments, attention_kwargs={}).sample, plain)
        with pytest.warns(UserWarning, match="'colour'.*not known"):
            assert torch.equal(both.ours(**arguments, attention_kwargs={"colour": 1}).sample, plain)


def test_return_dict_and_positional_arguments() -> None:
    both = pair("1.5-5b-i2v")
    arguments = call(both.config)
    with torch.no_grad():
        output = both.ours(**arguments)
        as_tuple = both.ours(**arguments, return_dict=False)
        in_order = both.ours(
            arguments["hidden_states"], arguments["encoder_hidden_states"], arguments["timestep"], None,
            arguments["ofs"], arguments["image_rotary_emb"], None, False,
        )  # fmt: skip
    assert isinstance(as_tuple, tuple)
    assert len(as_tuple) == 1
    assert torch.equal(as_tuple[0], output.sample)
    assert torch.equal(in_order[0], output.sample)
    assert torch.equal(output[0], output.sample)


def test_fusing_and_unfusing_projections_changes_nothing() -> None:
    both = new_pair(small("5b"))
    arguments = call(both.config)
    with torch.no_grad():
        before = both.ours(**arguments).sample
    for switch in ("fuse_qkv_projections", "unfuse_qkv_projections"):
        getattr(both.theirs, switch)()
        getattr(both.ours, switch)()
        assert both.error(arguments) <= TOLERANCE
        with torch.no_grad():
            assert torch.equal(both.ours(**arguments).sample, before)


def test_attention_processors_are_named_as_upstreams_and_can_be_set() -> None:
    both = new_pair(small("5b"))
    assert list(both.ours.attn_processors) == list(both.theirs.attn_processors)
    assert {backend.name for backend in both.ours.attn_processors.values()} == {"sdpa"}
    both.ours.set_attn_processor(both.theirs.attn_processors)
    both.ours.set_attn_processor(next(iter(both.theirs.attn_processors.values())))
    both.theirs.fuse_qkv_projections()
    both.ours.set_attn_processor(both.theirs.attn_processors)
    both.ours.set_attn_processor(BACKENDS["flex"])
    assert list(both.ours.attention_backends) == ["flex"]
    assert both.error(call(both.config)) <= TOLERANCE
    both.ours.set_attn_processor(dict.fromkeys(both.ours.attn_processors, BACKENDS["sdpa"]))
    assert list(both.ours.attention_backends) == ["sdpa"]


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "latents without frames": ("5b", {"hidden_states": torch.zeros(2, 16, 12, 10)}, r"has shape \(2, 16, 12, 10\)"),
    "channels before frames": ("5b", {"hidden_states": torch.zeros(2, 16, 4, 12, 10)}, "16 channels"),
    "no whole patch": ("5b", {"hidden_states": torch.zeros(2, 4, 16, 1, 10)}, "height is 1: at least one patch"),
    "odd height": ("1.5-5b", {"hidden_states": torch.zeros(2, 4, 16, 7, 10)}, "height is 7.*pad it to 8"),
    "odd frames": ("1.5-5b", {"hidden_states": torch.zeros(2, 3, 16, 12, 10)}, "frames is 3.*pad it to 4"),
    "text of another width": ("5b", {"encoder_hidden_states": torch.zeros(2, 8, 31)}, r"text tokens, 32\)"),
    "text of another batch": ("5b", {"encoder_hidden_states": torch.zeros(1, 8, 32)}, r"expected \(batch 2"),
    "text without batch": ("5b", {"encoder_hidden_states": torch.zeros(8, 32)}, "encoder_hidden_states has shape"),
    "long text": ("2b", {"encoder_hidden_states": torch.zeros(2, 9, 32)}, "9 text tokens, at most 8"),
    "long text, learned": ("5b-i2v", {"encoder_hidden_states": torch.zeros(2, 9, 32)}, "9 text tokens, at most 8"),
    "another size, learned": ("5b-i2v", {"hidden_states": torch.zeros(2, 4, 32, 10, 12)}, "for 12 × 10 only"),
    "timesteps of another batch": ("5b", {"timestep": torch.zeros(3)}, r"timestep has shape \(3,\)"),
    "timesteps in two dimensions": ("5b", {"timestep": torch.zeros(2, 1)}, r"timestep has shape \(2, 1\)"),
    "timestep_cond": ("5b", {"timestep_cond": torch.zeros(2, 48)}, "timestep_cond is given.*pass None"),
    "no ofs": ("1.5-5b-i2v", {"ofs": None}, "ofs is None.*pass 2.0"),
    "ofs of another batch": ("1.5-5b-i2v", {"ofs": torch.zeros(3)}, r"ofs has shape \(3,\)"),
    "tables of joint length": ("5b", {"image_rotary_emb": torch.zeros(2, 128, 64)}, r"expected \(120, 64\)"),
    "tables of half width": ("5b", {"image_rotary_emb": torch.zeros(2, 120, 32)}, r"expected \(120, 64\)"),
    "one table": ("5b", {"image_rotary_emb": torch.zeros(120, 64)}, "120 parts, expected two"),
    "three tables": ("5b", {"image_rotary_emb": torch.zeros(3, 120, 64)}, "3 parts, expected two"),
}  # fmt: skip


@for_each("case", WRONG)
def test_inputs_that_do_not_fit_are_named(case: str) -> None:
    name, changes, message = WRONG[case]
    both = pair(name)
    with pytest.raises(ValueError, match=message):
        both.ours(**call(both.config) | changes)


def test_timestep_cond_fails_on_upstream_too() -> None:
    both = pair("5b")
    with pytest.raises(TypeError):
        both.theirs(**call(both.config), timestep_cond=torch.zeros(2, 48))


def test_a_model_is_freed_when_it_is_let_go() -> None:
    """No cycle keeps its memory until the collector comes by."""
    model = CogVideoXModel(small("5b"))
    with torch.no_grad():
        model(**call(model.config))
    reference = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert reference() is None
    finally:
        gc.enable()


def test_held_tables_do_not_pile_up() -> None:
    model = CogVideoXModel(small("2b")).eval()
    with torch.no_grad():
        for width in range(2, 40, 2):
            model(**call(model.config, batch=1, frames=1, height=2, width=width))
    assert len(model.inputs.tables) <= 8
    assert not model.state_dict().keys() & {"tables", "pos_embedding"}


def test_tables_of_a_call_are_joined_once_and_again_when_they_are_others() -> None:
    """Pipelines give every step the same two. Written to in place, or in another place, they are others."""
    both = pair("5b")
    arguments = with_tables(both.config, call(both.config))
    cos, sin = arguments["image_rotary_emb"]

    def joined(**changes: Any) -> list[Tensor]:
        assert both.error(arguments | changes) < TOLERANCE
        latents, text, timestep = (
            (arguments | changes)[name] for name in ("hidden_states", "encoder_hidden_states", "timestep")
        )
        inputs = both.ours.inputs(both.ours, latents, text, timestep, None, (cos, sin), None, takes_block_masks=False)
        assert inputs.rotary is not None
        return list(inputs.rotary)

    def hold() -> list[Tensor]:
        held = joined()
        assert all(new is old for new, old in zip(joined(), held, strict=True))
        return held

    first = hold()
    text = arguments["encoder_hidden_states"]
    assert joined(encoder_hidden_states=text[:, 1:])[0].shape[0] == first[0].shape[0] - 1
    hold()
    cos.mul_(-1)
    assert joined()[0][-1].equal(-first[0][-1])
    hold()
    sin = -sin  # no more often written to than the one before
    arguments["image_rotary_emb"] = cos, sin
    assert joined()[1][-1].equal(-first[1][-1])


def test_tables_joined_in_inference_mode_serve_a_training_step_later() -> None:
    both = pair("5b")
    arguments = with_tables(both.config, call(both.config))
    model = copy.deepcopy(both.ours).train()
    with torch.inference_mode():
        expected = model(**arguments).sample
        tables = tuple(table.clone() for table in arguments["image_rotary_emb"])  # these have no version
        assert model(**arguments | {"image_rotary_emb": tables}).sample.equal(expected)
    sample = model(**arguments).sample
    sample.sum().backward()
    assert relative_error(sample.detach(), expected) < TOLERANCE
