"""Whole files onto the disk: tensors in the .safetensors format, one after the other, and JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogx_fast.weights.headers import NAMES, read_header


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors in their order; besides them only one at a time is held, where it is not in main memory."""
    fields: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    begin = 0
    for name, tensor in tensors.items():
        end = begin + tensor.nbytes
        fields[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    header = json.dumps(fields, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        for tensor in tensors.values():
            file.write(tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().data)
        _sync(file)
    read_header(path)  # as any reader will


def write_pickled(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as ``torch.save`` does, for ``torch.load(..., weights_only=True)``; all of them are copied."""
    with path.open("wb") as file:
        torch.save({name: tensor.detach().clone().cpu() for name, tensor in tensors.items()}, file)
        _sync(file)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a mapping, readable, with sorted keys."""
    write_text(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        _sync(file)


def sync_directory(path: Path) -> None:
    """Have renames in a directory on the disk, where the system can."""
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


__all__ = ["sync_directory", "write_json", "write_pickled", "write_tensors", "write_text"]
