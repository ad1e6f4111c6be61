"""How the tiny pipeline is made: diffusers' and transformers' own classes, small, seeded, with random weights.

The text side (tokenizer and frozen encoder) is final; the VAE and the transformer wait for training.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import shutil
import string
import tempfile
from pathlib import Path
from typing import Any

import torch

from cogx_fast.config import TransformerConfig
from cogx_fast.optional import MissingDependencyError, require

SEED = 20240812

VAE_CONFIG: dict[str, Any] = {
    "block_out_channels": (16, 16, 32, 64), "latent_channels": 8, "layers_per_block": 1, "norm_num_groups": 4,
    "sample_height": 64, "sample_width": 64, "scaling_factor": 1.0,
}  # fmt: skip
TEXT_CONFIG: dict[str, Any] = {
    "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu",
}  # fmt: skip
SCHEDULER_CONFIG: dict[str, Any] = {  # as released with CogVideoX-5b
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
    "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "set_alpha_to_one": True,
    "snr_shift_scale": 1.0, "timestep_spacing": "trailing",
}  # fmt: skip

_WORDS = Path(__file__).with_name("words.txt")
_SUFFIXES = (
    "s", "es", "ed", "d", "ing", "ly", "er", "est", "en", "al", "ic", "y", "ion", "tion", "ness", "ment", "ful", "less",
    "able", "'s", "ism", "ist", "ive", "ous", "ure", "age", "th", "st",
)  # fmt: skip
_PIECE_LENGTHS = (2, 3)


def vocabulary() -> list[tuple[str, float]]:
    """Pieces of a T5 tokenizer and their scores: special ones, whole words, endings, parts of words, characters.

    Scores are so that the fewest pieces win, and among those the longer first ones. Every text in Latin letters
    tokenizes without unknowns.
    """
    words = _WORDS.read_text(encoding="utf-8").split()
    parts = {word[i : i + n] for word in words for n in _PIECE_LENGTHS for i in range(1, len(word) - n + 1)}
    latin = [chr(code) for code in range(0xA1, 0x180) if code != 0xAD]
    characters = [*string.ascii_letters, *string.digits, *string.punctuation, *latin, *"‘’“”–—…"]
    groups: list[tuple[float, list[str]]] = [
        (-4.0, [f"▁{form}" for word in words for form in (word, word.capitalize())]),
        (-6.0, [*_SUFFIXES, ",", "."]),
        (-8.0, sorted(parts)),
        (-10.0, ["▁", *characters, *(f"▁{character}" for character in characters)]),
    ]
    scores: dict[str, float] = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0}
    for score, pieces in groups:
        for piece in pieces:
            scores.setdefault(piece, score)
    return list(scores.items())


def make_tiny_pipeline(directory: str | os.PathLike[str]) -> None:
    """Write the tiny pipeline with random weights, always the same ones, in diffusers' format.

    Args:
        directory: where to; made if need be.

    Raises:
        MissingDependencyError: diffusers or transformers is not installed.
    """
    diffusers = require("diffusers", why="to make the tiny pipeline")
    transformers = require("transformers", why="to make the tiny pipeline")
    pieces = vocabulary()
    tokenizer = transformers.T5Tokenizer(vocab=pieces, extra_ids=0)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(SEED)
        text_encoder = transformers.T5EncoderModel(transformers.T5Config(vocab_size=len(pieces), **TEXT_CONFIG))
        vae = diffusers.AutoencoderKLCogVideoX(**VAE_CONFIG)
        _spread_colours(vae)
        transformer = diffusers.CogVideoXTransformer3DModel(**TransformerConfig.preset("tiny"))
    diffusers.CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder.eval(),
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=diffusers.CogVideoXDDIMScheduler(**SCHEDULER_CONFIG),
    ).save_pretrained(directory)


def cached_pipeline_dir() -> Path:
    """The pipeline of ``make_tiny_pipeline`` in the user's cache, made there if it is not.

    It appears whole or not at all, also when several processes make it at once.

    Raises:
        MissingDependencyError: diffusers or transformers is not installed.
        OSError: the cache cannot be written; the message names it and how to choose another.
    """
    root = cache_root()
    directory = root / f"tiny-{_recipe_hash()}"
    if (directory / "model_index.json").is_file():
        return directory
    try:
        root.mkdir(parents=True, exist_ok=True)
        making = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=root))
    except OSError as error:
        reason = error.strerror or error
        raise OSError(
            f"cannot write the cache {root} ({reason}): set COGX_FAST_CACHE to a directory that can be written"
        ) from None
    try:
        make_tiny_pipeline(making)
        making.chmod(0o755)  # mkdtemp's is for this user alone
        with contextlib.suppress(OSError):  # another process was first: its pipeline is the same
            making.rename(directory)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    if not (directory / "model_index.json").is_file():
        raise OSError(f"{directory} is in the way and is no pipeline: remove it")
    return directory


def cache_root() -> Path:
    """``$COGX_FAST_CACHE``, else ``$XDG_CACHE_HOME/cogx_fast``, else ``~/.cache/cogx_fast``, as they are now."""
    if own := os.environ.get("COGX_FAST_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "cogx_fast"


def _recipe_hash() -> str:
    """Twelve hex digits that change with the recipe and with the versions of what writes the files."""
    digest = hashlib.sha256(Path(__file__).read_bytes() + _WORDS.read_bytes())
    digest.update(json.dumps(TransformerConfig.preset("tiny").to_dict()).encode())
    for package in ("diffusers", "transformers", "torch"):
        try:
            digest.update(importlib.metadata.version(package).encode())
        except importlib.metadata.PackageNotFoundError:
            raise MissingDependencyError(
                f"{package} is needed to make the tiny pipeline: pip install 'cogx-fast[pipelines,video]'"
            ) from None
    return digest.hexdigest()[:12]


def _spread_colours(vae: Any) -> None:
    """Scale the decoder's last layer so that random latents fill the range of colours, where it would be all grey."""
    latents = torch.randn(1, VAE_CONFIG["latent_channels"], 3, 8, 8)
    video = vae.decode(latents).sample
    last = vae.decoder.conv_out.conv
    mean, std = video.mean(dim=(0, 2, 3, 4)), video.std(dim=(0, 2, 3, 4))
    last.bias.sub_(mean).mul_(0.5 / std)
    last.weight.mul_((0.5 / std)[:, None, None, None, None])
