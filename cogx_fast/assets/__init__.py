"""What comes with the package: a tiny CogVideoX pipeline that a laptop runs."""

from __future__ import annotations

from pathlib import Path

CHECKSUMS = "SHA256SUMS"
"""File in the trained pipeline's directory with the SHA-256 of every other."""

_TRAINED = Path(__file__).parent / "tiny"


def tiny_pipeline_dir() -> Path:
    """Where the tiny pipeline lies, in diffusers' format (``CogVideoXPipeline.from_pretrained`` reads it).

    It is the trained one that comes with the package where there is one. Otherwise one with random weights is made on
    the first call, which takes a few seconds, and kept in ``$COGX_FAST_CACHE``, else ``$XDG_CACHE_HOME/cogx_fast``,
    else ``~/.cache/cogx_fast``. Videos are 64 × 64 pixels and 17 frames; call it with ``max_sequence_length=8``.

    Raises:
        MissingDependencyError: it has to be made and diffusers or transformers is not installed.
        OSError: the cache cannot be written.
    """
    if (_TRAINED / "model_index.json").is_file():
        return _TRAINED
    from cogx_fast.assets.recipe import cached_pipeline_dir

    return cached_pipeline_dir()


__all__ = ["CHECKSUMS", "tiny_pipeline_dir"]
