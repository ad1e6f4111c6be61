"""What comes with the package: a tiny CogVideoX pipeline, trained, that a laptop runs."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

CHECKSUMS = "SHA256SUMS"
"""File in the pipeline's directory with the SHA-256 of every other."""

_TRAINED = Path(__file__).parent / "tiny"


class AssetError(OSError):
    """A file of the tiny pipeline is damaged or missing; the message names it and says how to restore it."""


@functools.cache
def tiny_pipeline_dir() -> Path:
    """Where the tiny pipeline lies, in diffusers' format (``CogVideoXPipeline.from_pretrained`` reads it).

    It makes videos of handwritten digits, 64 × 64 pixels and 17 frames, from prompts like "the digit seven moving
    left"; call it with ``max_sequence_length=8``. Its card, README.md, lies beside it. Its files are checked on the
    first call.

    Raises:
        AssetError: one of them is damaged or missing.
    """
    check_pipeline(_TRAINED)
    return _TRAINED


def check_pipeline(directory: Path) -> None:
    """Compare every file with its checksum in ``SHA256SUMS``.

    Raises:
        AssetError: one is damaged or missing.
    """
    listed = directory / CHECKSUMS
    try:
        entries = [line.split("  ", 1) for line in listed.read_text(encoding="utf-8").splitlines()]
        checksums = {name: checksum for checksum, name in entries}
    except FileNotFoundError:
        raise _broken(listed, "is missing") from None
    except ValueError:
        raise _broken(listed, "is damaged: it is no list of checksums") from None
    if "model_index.json" not in checksums:
        raise _broken(listed, "is damaged: it does not list model_index.json")
    for name, expected in checksums.items():
        try:
            found = hashlib.sha256((directory / name).read_bytes()).hexdigest()
        except FileNotFoundError:
            raise _broken(directory / name, "is missing") from None
        if found != expected:
            raise _broken(directory / name, f"is damaged: its SHA-256 is {found[:12]}…, not {expected[:12]}…")


def _broken(path: Path, what: str) -> AssetError:
    return AssetError(
        f"{path} {what}. Restore the tiny pipeline: git checkout -- cogx_fast/assets/tiny in a checkout of the "
        "repository, else pip install --force-reinstall --no-deps cogx-fast"
    )


__all__ = ["CHECKSUMS", "AssetError", "check_pipeline", "tiny_pipeline_dir"]
