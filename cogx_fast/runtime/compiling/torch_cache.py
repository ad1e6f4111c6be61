"""The directory where torch keeps what it compiled: one that cannot be written to costs a warning, not the run."""

from __future__ import annotations

import atexit
import errno
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")

_CANNOT_WRITE = {
    errno.EACCES, errno.EDQUOT, errno.EIO, errno.ENOENT, errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS
}  # fmt: skip


class CacheDirectory:
    """torch's own cache directory until that fails; then a temporary one of this process, with one warning."""

    def __init__(self) -> None:
        self._temporary: str | None = None
        chosen = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
        if chosen:  # torch makes it when its compiler is imported
            try:
                os.makedirs(chosen, exist_ok=True)
            except OSError as error:
                self._replace(str(error))

    @contextmanager
    def used(self) -> Iterator[None]:
        """Inside the ``with`` block torch's caches are there; nothing else of the environment changes."""
        if self._temporary is None:
            yield
            return
        changed = {
            "TORCHINDUCTOR_CACHE_DIR": self._temporary,
            "TRITON_CACHE_DIR": os.path.join(self._temporary, "triton"),
        }
        before = {name: os.environ.get(name) for name in changed}
        os.environ.update(changed)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value

    def retried(self, run: Callable[..., T], *arguments: Any) -> T:
        """``run(*arguments)``; if it fails because the cache directory cannot be written to, once more without it."""
        try:
            return run(*arguments)
        except Exception as error:
            reason = storage_error(error)
            if reason is None or self._temporary is not None:
                raise
        self._replace(reason)
        with self.used():
            return run(*arguments)

    def _replace(self, reason: str) -> None:
        self._temporary = tempfile.mkdtemp(prefix="cogx_fast_compiled_")
        atexit.register(shutil.rmtree, self._temporary, ignore_errors=True)
        warnings.warn(
            f"torch's cache directory cannot be written to ({reason}): compiled code goes to a temporary directory and "
            "the next process compiles again. Set TORCHINDUCTOR_CACHE_DIR to a directory with space that is yours",
            stacklevel=3,
        )


def storage_error(error: BaseException | None) -> str | None:
    """Why storage failed, in the operating system's words, if that is what an error of the compiler comes from."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        current = waiting.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, OSError) and current.errno in _CANNOT_WRITE and not _is_missing_program(current):
            return str(current)
        if os.strerror(errno.ENOSPC) in str(current):  # a compiler's own words
            return os.strerror(errno.ENOSPC)
        waiting += [current.__cause__, current.__context__, getattr(current, "inner_exception", None)]
    return None


def _is_missing_program(error: OSError) -> bool:
    """A compiler that is not installed is a FileNotFoundError too, without a directory in its name."""
    return error.errno == errno.ENOENT and os.path.sep not in str(error.filename or "")


__all__ = ["CacheDirectory", "storage_error"]
