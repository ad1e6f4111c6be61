"""Bytes from files into tensors: mapped where they can stay as they are, else read straight to their place.

A mapped tensor costs no copy and no memory of its own until it is used; what it needs is that its bytes stand in one
run in one file, in the dtype wanted, and that it shall live in main memory. All else is read in chunks by a few threads
into tensors allocated once; there is never more than one chunk for each thread besides them.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from cogx_fast.weights.errors import CheckpointError
from cogx_fast.weights.headers import DTYPES, Stored

_CHUNK_BYTES = 16 << 20
_MOST_THREADS = 4


class Maps:
    """Private mappings of files, one each: writing to a tensor in one changes memory, never the file."""

    def __init__(self) -> None:
        self._maps: dict[Path, mmap.mmap] = {}

    def tensor(self, run: Sequence[Stored], shape: tuple[int, ...]) -> Tensor:
        """A tensor on the bytes of a run of stored tensors (see ``is_run``). It keeps the mapping alive."""
        path = run[0].path
        if path not in self._maps:
            with path.open("rb") as file:
                self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        count = sum(stored.nbytes for stored in run) // DTYPES[run[0].dtype].itemsize
        mapped = torch.frombuffer(self._maps[path], dtype=DTYPES[run[0].dtype], count=count, offset=run[0].offset)
        return mapped.view(shape)


def announce(paths: Iterable[Path]) -> None:
    """Have the system start to read files that it does not hold in memory yet, where it takes such advice."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def is_run(run: Sequence[Stored]) -> bool:
    """Whether stored tensors of one dtype follow each other without a gap, in that order, aligned to their dtype."""
    first = run[0]
    if first.dtype not in DTYPES or first.offset % DTYPES[first.dtype].itemsize:
        return False
    return all(
        (after.path, after.dtype, after.offset) == (before.path, before.dtype, before.offset + before.nbytes)
        for before, after in pairwise(run)
    )


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    path: Path
    offset: int
    dtype: torch.dtype
    destination: Tensor
    """Flat."""

    @property
    def nbytes(self) -> int:
        return self.destination.numel() * self.dtype.itemsize


def read(pieces: Sequence[tuple[Stored, Tensor]]) -> None:
    """Fill each tensor (contiguous, of the stored shape, any dtype and device) with its stored values.

    Raises:
        CheckpointError: a file ended early or cannot be read.
    """
    ordered = sorted(pieces, key=lambda piece: (piece[0].path, piece[0].offset))
    chunks = [chunk for stored, destination in ordered for chunk in _chunks(stored, destination)]
    threads = max(1, min(_MOST_THREADS, os.cpu_count() or 1, len(chunks)))
    with ThreadPoolExecutor(threads) as pool:
        for future in [pool.submit(_read_chunks, chunks[first::threads]) for first in range(threads)]:
            future.result()


def _chunks(stored: Stored, destination: Tensor) -> list[_Chunk]:
    dtype = DTYPES[stored.dtype]
    values = _CHUNK_BYTES // dtype.itemsize
    return [
        _Chunk(path=stored.path, offset=stored.offset + index * values * dtype.itemsize, dtype=dtype, destination=part)
        for index, part in enumerate(destination.view(-1).split(values))
    ]


@torch.no_grad()
def _read_chunks(chunks: Sequence[_Chunk]) -> None:
    """One thread's share: chunks in the order of files and offsets."""
    scratch = torch.empty(0, dtype=torch.uint8)
    path, file = None, None
    try:
        for chunk in chunks:
            if file is None or chunk.path != path:
                if file is not None:
                    file.close()
                path, file = chunk.path, chunk.path.open("rb", buffering=0)
            file.seek(chunk.offset)
            destination = chunk.destination
            if destination.device.type == "cpu" and destination.dtype == chunk.dtype:
                _fill(file.readinto, _buffer(destination), chunk)
                continue
            if scratch.numel() < chunk.nbytes:
                scratch = torch.empty(_CHUNK_BYTES, dtype=torch.uint8, pin_memory=destination.device.type == "cuda")
            source = scratch[: chunk.nbytes]
            _fill(file.readinto, _buffer(source), chunk)
            destination.copy_(source.view(chunk.dtype))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error}): check the disk, or restore the file") from error
    finally:
        if file is not None:
            file.close()


def _buffer(tensor: Tensor) -> memoryview:
    return tensor.view(torch.uint8).numpy().data


def _fill(readinto: object, buffer: memoryview, chunk: _Chunk) -> None:
    assert callable(readinto)
    while buffer:
        count = readinto(buffer)
        if not count:
            raise CheckpointError(
                f"{chunk.path}: ended while it was read: it was changed or cut short, restore the file"
            )
        buffer = buffer[count:]


__all__ = ["Maps", "announce", "is_run", "read"]
