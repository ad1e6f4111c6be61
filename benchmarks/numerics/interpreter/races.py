"""Programs of one launch run at once and in any order: none may touch what another one writes."""

from __future__ import annotations

import numpy as np

_NOBODY, _SEVERAL = -1, -2


class Races:
    """Who read and who wrote each element during one launch."""

    def __init__(self) -> None:
        self._readers: dict[tuple[int, int], np.ndarray] = {}
        self._writers: dict[tuple[int, int], np.ndarray] = {}

    def touch(
        self, elements: np.ndarray, buffer: tuple[int, int], length: int, program: int, *, writes: bool
    ) -> str | None:
        """Note an access.

        Args:
            elements: numbers of the elements in the buffer.
            buffer: its address and the size of an element.
            length: its elements.
            program: whose access it is.
            writes: a store; else a load.

        Returns:
            How it races with another program's access, or None.
        """
        if buffer not in self._writers:
            self._writers[buffer] = np.full(length, _NOBODY, np.int32)
            self._readers[buffer] = np.full(length, _NOBODY, np.int32)
        writer, reader = self._writers[buffer][elements], self._readers[buffer][elements]
        foreign = (writer != _NOBODY) & (writer != program)
        if foreign.any():
            return f"{'writes' if writes else 'reads'} what program {int(writer[foreign][0])} writes"
        if not writes:
            self._readers[buffer][elements] = np.where((reader == _NOBODY) | (reader == program), program, _SEVERAL)
            return None
        if ((reader != _NOBODY) & (reader != program)).any():
            return "writes what another program reads"
        self._writers[buffer][elements] = program
        return None


__all__ = ["Races"]
