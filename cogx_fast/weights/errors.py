"""What can be wrong with a checkpoint, and how names are counted out in messages."""

from __future__ import annotations

from collections.abc import Iterable


class CheckpointError(ValueError):
    """A source that cannot be loaded, or not as asked; the message says what was found and what to do."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """A source, or a file that belongs to it, is not there."""

    __str__ = Exception.__str__


def some(names: Iterable[str], count: int = 4) -> str:
    """The first few names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - count} more" if len(listed) > count else ""
    return ", ".join(listed[:count]) + more


__all__ = ["CheckpointError", "CheckpointNotFoundError", "some"]
