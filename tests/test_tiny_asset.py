"""The trained tiny pipeline: whole, as its card says, and good enough to judge speed-ups by."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cogx_fast
from cogx_fast import assets
from cogx_fast.assets import digits
from cogx_fast.video import quality
from tests.cases import for_each

DIRECTORY = Path(assets.__file__).parent / "tiny"
MOST_BYTES = 16_000_000


@pytest.fixture(scope="module")
def pipe() -> Any:
    from diffusers import CogVideoXPipeline

    loaded = CogVideoXPipeline.from_pretrained(assets.tiny_pipeline_dir())
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_files_checksums_and_card_agree() -> None:
    assets.check_pipeline(DIRECTORY)
    card = (DIRECTORY / "README.md").read_text(encoding="utf-8")
    listed = dict(line.split("  ")[::-1] for line in (DIRECTORY / assets.CHECKSUMS).read_text().splitlines())
    on_disk = {path.relative_to(DIRECTORY).as_posix() for path in DIRECTORY.rglob("*") if path.is_file()}
    assert on_disk == {*listed, assets.CHECKSUMS, "README.md"}
    for name, checksum in listed.items():
        if name.endswith(".safetensors"):
            assert f"`{name}` | `{checksum}`" in card


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in DIRECTORY.rglob("*") if path.is_file()) <= MOST_BYTES


def test_no_file_names_the_machine_that_made_it() -> None:
    for path in DIRECTORY.rglob("*.json"):
        assert "_name_or_path" not in path.read_text(encoding="utf-8")


@torch.no_grad()
def test_our_model_equals_diffusers_on_it(pipe: Any) -> None:
    ours = cogx_fast.load("tiny", dtype="fp32")
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 5, 8, 8, 8, generator=generator)
    text, _ = pipe.encode_prompt(
        ["the digit seven moving left", ""], do_classifier_free_guidance=False, max_sequence_length=8
    )
    timesteps = torch.tensor([999, 400])
    rotary = pipe._prepare_rotary_positional_embeddings(64, 64, 5, torch.device("cpu"))
    expected = pipe.transformer(latents, text, timesteps, image_rotary_emb=rotary).sample
    actual = ours(latents, text, timesteps, image_rotary_emb=rotary).sample
    assert (actual - expected).norm() / expected.norm() <= 1e-5


def test_its_videos_show_what_was_asked(pipe: Any) -> None:
    """A small share of ``python -m benchmarks.tiny.evaluate``, whose figures are in the card; a fifth of the steps."""
    asked = [(digit, quality.MOTIONS[digit % 5]) for digit in range(10)]
    generators = [torch.Generator().manual_seed(i) for i in range(len(asked))]
    videos = pipe(
        [digits.prompt(*one) for one in asked], num_inference_steps=10, max_sequence_length=8,
        generator=generators, output_type="np",
    ).frames  # fmt: skip
    accuracy = quality.measure(list(np.asarray(videos)), asked)
    assert accuracy.digit >= 0.9
    assert accuracy.motion >= 0.95
    assert accuracy.frame_agreement >= 0.95


@torch.no_grad()
def test_its_vae_keeps_digits_it_has_not_seen(pipe: Any) -> None:
    videos, _ = quality.real_clips(20)
    clips = torch.from_numpy(np.stack(videos)).permute(0, 4, 1, 2, 3) * 2 - 1
    decoded = torch.cat([pipe.vae.decode(pipe.vae.encode(part).latent_dist.mean).sample for part in clips.split(10)])
    restored = ((decoded.clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 4, 1).numpy()
    assert quality.psnr(restored.reshape(-1, 64, 64, 3), np.concatenate(videos)) >= 31


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return copied(tmp_path)


def copied(folder: Path) -> Path:
    return Path(shutil.copytree(DIRECTORY, folder / "tiny"))


@for_each("name", ["model_index.json", "vae/diffusion_pytorch_model.safetensors", assets.CHECKSUMS])
def test_a_missing_file_is_named_with_the_remedy(name: str, tmp_path: Path) -> None:
    copy = copied(tmp_path)
    (copy / name).unlink()
    with pytest.raises(assets.AssetError, match=r"missing\. Restore .*git checkout -- cogx_fast/assets/tiny") as error:
        assets.check_pipeline(copy)
    assert str(copy / name) in str(error.value)


def test_a_damaged_file_is_named_with_the_remedy(copy: Path) -> None:
    weights = copy / "transformer/diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(assets.AssetError, match=r"is damaged: .* Restore .*pip install --force-reinstall") as error:
        assets.check_pipeline(copy)
    assert str(weights) in str(error.value)


@for_each("content", ["", "nonsense\n", f"{hashlib.sha256(b'').hexdigest()}  other\n"])
def test_a_damaged_list_is_named(content: str, copy: Path) -> None:
    (copy / assets.CHECKSUMS).write_text(content)
    with pytest.raises(assets.AssetError, match="SHA256SUMS is damaged"):
        assets.check_pipeline(copy)
