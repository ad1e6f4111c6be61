"""What the commands say beside their results, and what libraries may not."""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cogx_fast.extras import require
from cogx_fast.terminal import Progress

_PACKAGE = Path(__file__).parents[1]


def warn(notes: Sequence[str], progress: Progress) -> None:
    """Warnings to stderr, a line each."""
    progress.clear()
    for note in notes:
        print(f"warning: {note}", file=sys.stderr)


def note(progress: Progress) -> Callable[[str], None]:
    """What writes a line to stderr that is no warning."""

    def tell(line: str) -> None:
        progress.clear()
        print(line, file=sys.stderr)

    return tell


def fail(message: str, status: int, *, debug: bool) -> int:
    """The error's line to stderr, and the exit status."""
    if debug:
        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)
    return status


def one_line(error: Exception) -> str:
    """What an error says, on one line."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def quiet_libraries(*, debug: bool) -> Iterator[None]:
    """Keep what other libraries log and warn of off the terminal; our own warnings are shown as lines."""
    if debug:
        yield
        return
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)

    def show(message: Warning | str, category: type[Warning], filename: str, *_: Any, **__: Any) -> None:
        if Path(filename).is_relative_to(_PACKAGE):
            print(f"warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        try:
            yield
        finally:
            logging.disable(before)


def quiet_bars() -> None:
    """Loading bars off: the command line has its own, and none where stderr is no terminal."""
    for library in ("diffusers", "transformers"):
        require(library, why="to run pipelines")
        require(f"{library}.utils.logging", why="to run pipelines").disable_progress_bar()


def finite(value: float) -> float | None:
    """None in place of infinity, which JSON lacks."""
    return value if math.isfinite(value) else None


__all__ = ["fail", "finite", "note", "one_line", "quiet_bars", "quiet_libraries", "warn"]
