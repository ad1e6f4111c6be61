from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cogx_fast import assets
from cogx_fast.assets import recipe
from cogx_fast.config import PRESETS
from tests.cases import for_each


@pytest.fixture(scope="module")
def directory() -> Path:
    return assets.tiny_pipeline_dir()


@pytest.fixture(scope="module")
def pipe(directory: Path) -> Any:
    from diffusers import CogVideoXPipeline

    loaded = CogVideoXPipeline.from_pretrained(directory)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_unmodified_diffusers_makes_a_video_with_it(pipe: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    video = pipe(
        "a seven moving left", num_inference_steps=3, max_sequence_length=8, generator=generator, output_type="np"
    ).frames
    assert video.shape == (1, 17, 64, 64, 3)
    assert 0.1 < video.std() < 0.5  # colours, neither one grey nor all black and white


def test_its_parts_are_as_described(pipe: Any) -> None:
    config = {key: value for key, value in pipe.transformer.config.items() if not key.startswith("_")}
    assert config == dict(PRESETS["tiny"])
    assert pipe.vae.config.block_out_channels == [16, 16, 32, 64]
    assert (pipe.vae_scale_factor_spatial, pipe.vae_scale_factor_temporal) == (8, 4)
    scheduler = pipe.scheduler.config
    assert (scheduler.prediction_type, scheduler.timestep_spacing) == ("v_prediction", "trailing")
    assert scheduler.rescale_betas_zero_snr
    assert scheduler.snr_shift_scale == 1.0
    assert pipe.text_encoder.config.vocab_size == len(pipe.tokenizer)


@for_each(
    "prompt, tokens",
    [
        ("a seven moving left", ["▁a", "▁seven", "▁moving", "▁left", "</s>"]),
        ("the digit zero, standing still", ["▁the", "▁digit", "▁zero", ",", "▁standing", "▁still", "</s>"]),
        ("A panda plays", ["▁A", "▁panda", "▁plays", "</s>"]),
        ("", ["</s>"]),
    ],
)
def test_common_words_are_one_token(pipe: Any, prompt: str, tokens: list[str]) -> None:
    assert pipe.tokenizer.convert_ids_to_tokens(pipe.tokenizer(prompt).input_ids) == tokens


@pytest.mark.parametrize(
    "prompt",
    [
        "Extraordinarily photosynthesising zebras quarrel (at 7:45 p.m.) over £3.50 & a half-eaten “éclair”…",
        "".join(map(chr, range(0x20, 0x7F))),
    ],
)
def test_english_has_no_unknowns_and_comes_back(pipe: Any, prompt: str) -> None:
    ids = pipe.tokenizer(prompt).input_ids
    assert pipe.tokenizer.unk_token_id not in ids
    assert pipe.tokenizer.decode(ids, skip_special_tokens=True).split() == prompt.split()


def test_pieces_are_unique() -> None:
    pieces = [piece for piece, _ in recipe.vocabulary()]
    assert len(pieces) == len(set(pieces))
    assert pieces[:3] == ["<pad>", "</s>", "<unk>"]


def test_words_change_the_embedding(pipe: Any) -> None:
    def encode(prompt: str) -> torch.Tensor:
        return pipe.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=8)[0]

    left, right = encode("a seven moving left"), encode("a seven moving right")
    assert left.shape == (1, 8, 64)
    assert (left - right).norm() / left.norm() > 0.1


def test_the_text_side_is_what_the_recipe_gives(pipe: Any) -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    tokenizer, encoder = recipe.make_text_side()
    assert torch.equal(torch.get_rng_state(), state)  # the caller's random numbers stay the caller's
    assert tokenizer.get_vocab() == pipe.tokenizer.get_vocab()
    shipped = pipe.text_encoder.state_dict()
    assert all(torch.equal(value.bfloat16().float(), shipped[name]) for name, value in encoder.state_dict().items())


def test_without_transformers_the_error_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from cogx_fast.assets.recipe import make_text_side\n"
        "make_text_side()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "MissingDependencyError: transformers is needed to make the tiny pipeline's text side: pip" in result.stderr
