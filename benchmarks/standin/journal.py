"""What the stand-in was asked to do, from within the process that runs on it."""

from __future__ import annotations

import ctypes
import functools
from collections import Counter
from dataclasses import dataclass


@functools.cache
def _library() -> ctypes.CDLL:
    """The process itself, which has the stand-in loaded.

    Raises:
        RuntimeError: it has not.
    """
    process = ctypes.CDLL(None)
    if not hasattr(process, "standin_launches"):
        raise RuntimeError(
            "this process does not run on the stand-in device: start it by `python -m benchmarks.standin`"
        )
    process.standin_launches.restype = ctypes.c_long
    for name in ("standin_journal_size", "standin_used", "standin_peak"):
        getattr(process, name).restype = ctypes.c_size_t
    return process


def is_loaded() -> bool:
    """Whether this process runs on the stand-in device."""
    return hasattr(ctypes.CDLL(None), "standin_launches")


@dataclass(frozen=True)
class Journal:
    """Lines of the journal, in order (native/journal.c says what there is)."""

    lines: tuple[str, ...]

    def of(self, kind: str, *, captured: bool = False) -> list[str]:
        """What follows the kind in its lines: of what was done at once, or of what a CUDA graph recorded."""
        start = f"captured {kind} " if captured else f"{kind} "
        return [line.removeprefix(start) for line in self.lines if line.startswith(start)]

    @property
    def kernels(self) -> Counter[str]:
        """How often each kernel of torch's own ran, by its mangled name."""
        return Counter(line.split()[0] for line in self.of("kernel"))

    @property
    def triton(self) -> Counter[str]:
        """How often each kernel that Triton made ran."""
        return Counter(line.split()[0] for line in self.of("triton"))

    @property
    def library(self) -> Counter[str]:
        """How often each function of cuBLAS, cuBLASLt and cuDNN ran."""
        return Counter(line.split()[0] for line in self.of("library"))

    @property
    def replays(self) -> list[int]:
        """Launches in each CUDA graph that was replayed."""
        return [int(line.split()[1]) for line in self.of("graph") if line.startswith("launch")]

    @property
    def recordings(self) -> list[int]:
        """Launches in each CUDA graph that was recorded."""
        return [int(line.split()[1]) for line in self.of("graph") if line.startswith("end")]

    @property
    def devices(self) -> set[int]:
        """The devices that kernels ran on."""
        work = [*self.of("kernel"), *self.of("triton")]
        return {int(line.rsplit(maxsplit=1)[1]) for line in work}

    def count(self, word: str) -> int:
        """Lines of work, done or recorded, that contain the word."""
        return sum(word in line for line in self.lines)


def read() -> Journal:
    """The journal since the start or the last ``clear``."""
    library = _library()
    size = library.standin_journal_size()
    text = ctypes.create_string_buffer(size + 1)
    library.standin_read_journal(text, ctypes.c_size_t(size))
    return Journal(tuple(text.raw[:size].decode(errors="replace").splitlines()))


def clear() -> None:
    """Forget what was done so far."""
    _library().standin_clear()


def launches() -> int:
    """Launches since the start or the last ``clear``: kernels, library calls, fills and copies within the device, and
    those of replayed CUDA graphs."""
    return int(_library().standin_launches())


def used(device: int = 0) -> int:
    """Bytes that are allocated from the driver now."""
    return int(_library().standin_used(device))


def peak(device: int = 0) -> int:
    """Bytes that were allocated from the driver at most since the start or ``reset_peak``."""
    return int(_library().standin_peak(device))


def reset_peak(device: int = 0) -> None:
    """Start ``peak`` again from what is allocated now."""
    _library().standin_reset_peak(device)
