"""torch's flags for a while, where several threads want them at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class Flags:
    """Values that a config module of torch has while a call needs them, and only then.

    In newer versions of torch each thread has its own. In 2.11 all share them: they are set by the first thread that
    comes and set back by the last that goes, or one would leave behind what another had set.

    Args:
        config: the module.
        values: by name.
    """

    def __init__(self, config: Any, values: Mapping[str, Any]) -> None:
        self._config, self._values = config, dict(values)
        self._lock = threading.Lock()
        self._holders = 0
        self._before: dict[str, Any] = {}
        self._is_per_thread: bool | None = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside the ``with`` block they are set."""
        if self._is_per_thread is None:
            with self._lock:
                if self._is_per_thread is None:
                    self._is_per_thread = self._find_out()
        with self._config.patch(self._values) if self._is_per_thread else self._shared():
            yield

    @contextmanager
    def _shared(self) -> Iterator[None]:
        with self._lock:
            if not self._holders:
                self._before = {name: getattr(self._config, name) for name in self._values}
                self._set(self._values)
            self._holders += 1
        try:
            yield
        finally:
            with self._lock:
                self._holders -= 1
                if not self._holders:
                    self._set(self._before)

    def _set(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            setattr(self._config, name, value)

    def _find_out(self) -> bool:
        """Whether another thread goes without what this one sets."""
        name = next(iter(self._values))
        before, seen = getattr(self._config, name), []
        thread = threading.Thread(target=lambda: seen.append(getattr(self._config, name)))
        with self._config.patch({name: not before}):
            thread.start()
            thread.join()
        return seen == [before]


__all__ = ["Flags"]
