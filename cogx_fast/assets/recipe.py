"""How the tiny pipeline is made: diffusers' and transformers' own classes, small, seeded.

The text side (tokenizer and frozen random encoder) is made here; the VAE and the transformer are trained by
``benchmarks/tiny``.
"""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch

from cogx_fast.extras import require

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


def make_text_side() -> tuple[Any, Any]:
    """The tokenizer, and the frozen text encoder with random weights, always the same ones.

    Raises:
        MissingDependencyError: transformers is not installed.
    """
    transformers = require("transformers", why="to make the tiny pipeline's text side")
    pieces = vocabulary()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        encoder = transformers.T5EncoderModel(transformers.T5Config(vocab_size=len(pieces), **TEXT_CONFIG))
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=0), encoder.eval().requires_grad_(False)


__all__ = ["SCHEDULER_CONFIG", "SEED", "TEXT_CONFIG", "VAE_CONFIG", "make_text_side", "vocabulary"]
