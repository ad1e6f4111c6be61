"""The files of a checkpoint as a store of weights: described by their headers, mapped or read into a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from cogx_fast.weights.checks import check_dtype, check_values
from cogx_fast.weights.foreign import bare_names
from cogx_fast.weights.headers import DTYPES, Stored
from cogx_fast.weights.layout import Slot, our_shape
from cogx_fast.weights.quantized import Found, Weight, check_same, describe
from cogx_fast.weights.reading import Maps, announce, is_run, read
from cogx_fast.weights.sources import Source


class FileStore:
    """The weights in a checkpoint's files (``assemble.Store``); only headers are read here.

    Args:
        source: the files.

    Raises:
        CheckpointError: a file is damaged or is none of safetensors.
    """

    device = torch.device("cpu")

    def __init__(self, source: Source) -> None:
        self.config = source.config
        self._stored, self.origin = _without_prefixes(source.headers(), str(source.weights))
        described = describe(self._stored, source.metadata(self._stored), source.config, self.origin)
        self.found: Found = (
            described.found if described else {name: (each.shape, each.dtype) for name, each in self._stored.items()}
        )
        self._weights: dict[str, Weight] = described.weights if described else {}
        self.quantized = {name: weight.dtype for name, weight in self._weights.items()}
        self.recipe = described.recipe if described else None
        self._states = self._look()

    def _look(self) -> dict[Path, tuple[int, int] | None]:
        """Size and time of change of each file; None where there is none any more."""
        states: dict[Path, tuple[int, int] | None] = {}
        for path in {tensor.path for tensor in self._stored.values()}:
            try:
                found = path.stat()
            except OSError:
                states[path] = None
            else:
                states[path] = found.st_size, found.st_mtime_ns
        return states

    @property
    def is_unchanged(self) -> bool:
        """Whether the files are still those whose headers were read, as far as size and time of change tell."""
        return self._look() == self._states

    def check(self, layout: Mapping[str, Slot], dtype: torch.dtype | None, *, finite: bool) -> None:
        """See that what is quantized can be taken; have the system begin to read.

        Raises:
            CheckpointError: it cannot, or not in that dtype.
        """
        for name, weight in self._weights.items():
            check_dtype(name, weight.dtype, dtype, self.origin)
            check_same(weight, self.origin)
        announce({tensor.path for tensor in self._stored.values()})

    def read(
        self, names: Mapping[str, list[Slot]], dtypes: Mapping[str, torch.dtype], device: torch.device, *, stay: bool
    ) -> dict[str, tuple[Tensor, bool]]:
        """Our tensors: mapped where they can stay as they are, else allocated and read."""
        maps = Maps()
        found: dict[str, tuple[Tensor, bool]] = {}
        pieces: list[tuple[Stored, Tensor]] = []
        for name, group in names.items():
            if name in self._weights:
                tensor, to_read = self._weights[name].pieces(maps, device)
                found[name] = tensor, False
                pieces += to_read
                continue
            parts, shape = [self._stored[slot.name] for slot in group], our_shape(self.config, group)
            if stay and device.type == "cpu" and DTYPES[parts[0].dtype] == dtypes[name] and is_run(parts):
                found[name] = maps.tensor(parts, shape), True
                continue
            tensor = torch.empty(shape, dtype=dtypes[name], device=device)
            found[name] = tensor, True
            pieces += [(part, slot.view(tensor)) for part, slot in zip(parts, group, strict=True)]
        read(pieces)
        return found

    def check_read(self, model: nn.Module, names: Mapping[str, list[Slot]]) -> None:
        """Raise ``CheckpointError`` where a value is infinite or NaN."""
        check_values(model, {slot.name: slot for group in names.values() for slot in group}, self.origin)

    def give_up(self, names: Iterable[str]) -> None:
        """Files stay as they are."""


def _without_prefixes(stored: dict[str, Stored], origin: str) -> tuple[dict[str, Stored], str]:
    """A checkpoint's tensors by the names that a model's own have, and what to call it in messages."""
    bare = bare_names(stored)
    changed = next((name for name, rest in bare.items() if rest != name), None)
    if changed is None or len(set(bare.values())) < len(bare):
        return stored, origin
    named = {bare[name]: dataclasses.replace(one, name=bare[name]) for name, one in stored.items()}
    return named, f"{origin} ({changed!r} read as {bare[changed]!r}, and so all names)"


__all__ = ["FileStore"]
