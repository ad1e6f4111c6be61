from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cogx_fast import assets
from cogx_fast.assets import recipe
from cogx_fast.config import PRESETS


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


@pytest.mark.parametrize(
    ("prompt", "tokens"),
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


def test_the_recipe_gives_the_same_weights_again(directory: Path, tmp_path: Path) -> None:
    if directory.parent == Path(assets.__file__).parent:
        pytest.skip("the trained pipeline is in use: the recipe's weights are not")
    torch.manual_seed(7)
    state = torch.get_rng_state()
    recipe.make_tiny_pipeline(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's random numbers stay the caller's
    for name in ("transformer", "vae"):
        file = f"{name}/diffusion_pytorch_model.safetensors"
        assert (tmp_path / file).read_bytes() == (directory / file).read_bytes()


def test_a_trained_one_is_preferred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets, "_TRAINED", tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    assert assets.tiny_pipeline_dir() == tmp_path


def test_the_cache_is_where_the_user_says_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COGX_FAST_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert recipe.cache_root() == tmp_path / "xdg" / "cogx_fast"
    monkeypatch.setenv("COGX_FAST_CACHE", str(tmp_path / "own"))
    assert recipe.cache_root() == tmp_path / "own"
    monkeypatch.delenv("COGX_FAST_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert recipe.cache_root() == Path.home() / ".cache" / "cogx_fast"


def test_an_interrupted_making_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(directory: Path) -> None:
        (Path(directory) / "model_index.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setenv("COGX_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(recipe, "make_tiny_pipeline", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recipe.cached_pipeline_dir()
    assert list(tmp_path.iterdir()) == []


def test_the_second_of_two_makers_uses_the_first_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def overtaken(making: Path) -> None:
        (Path(making) / "model_index.json").write_text(json.dumps("second"))
        first = tmp_path / Path(making).name.removeprefix(".").rpartition("-")[0]
        shutil.copytree(making, first)
        (first / "model_index.json").write_text(json.dumps("first"))

    monkeypatch.setenv("COGX_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(recipe, "make_tiny_pipeline", overtaken)
    directory = recipe.cached_pipeline_dir()
    assert json.loads((directory / "model_index.json").read_text()) == "first"
    assert list(tmp_path.iterdir()) == [directory]


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("COGX_FAST_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match="set COGX_FAST_CACHE to a directory that can be written"):
        recipe.cached_pipeline_dir()


def test_without_diffusers_the_error_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['diffusers'] = None\n"
        "from cogx_fast.assets.recipe import make_tiny_pipeline\n"
        "make_tiny_pipeline('nowhere')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "MissingDependencyError: diffusers is needed to make the tiny pipeline: pip install" in result.stderr
