"""Files that are there whole, or as they were."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write to, which takes the place of ``path``, on the disk, or is removed if something is raised.

    Raises:
        OSError: it cannot be written, or cannot take that place; what was there is unchanged.
    """
    target = Path(path)
    hidden = target.with_name(f".{target.name}-{secrets.token_hex(4)}{target.suffix}")  # np.savez adds a missing suffix
    try:
        yield hidden
        with hidden.open("rb+") as written:
            os.fsync(written.fileno())
        hidden.replace(target)
    finally:
        hidden.unlink(missing_ok=True)


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file whole, or not at all."""
    with whole_file(path) as hidden:
        hidden.write_text(text, encoding="utf-8")


__all__ = ["whole_file", "write_whole"]
