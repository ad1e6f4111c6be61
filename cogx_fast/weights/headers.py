"""What a .safetensors file says it holds: checked by the safetensors library, read without touching the weights."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from cogx_fast.weights.errors import CheckpointError, CheckpointNotFoundError

FLOATING: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""Stored dtypes that weights can have, by the format's names. (8-bit ones only together with a dtype to convert to.)"""

DTYPES: dict[str, torch.dtype] = FLOATING | {
    "I8": torch.int8,
    "U8": torch.uint8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}
"""Stored dtypes that can be read: besides ``FLOATING`` those of a quantized weight's inner tensors."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One tensor of a file: what it is and where its bytes are."""

    name: str
    dtype: str
    """The format's name, e.g. "BF16"."""
    shape: tuple[int, ...]
    path: Path
    offset: int
    """First byte in the file."""
    nbytes: int


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a file, by name, in the order of their bytes.

    Raises:
        CheckpointNotFoundError: there is no such file.
        CheckpointError: it is no whole .safetensors file.
    """
    if not path.is_file():
        raise CheckpointNotFoundError(f"{path}: no such file: restore it, e.g. by downloading it again")
    try:
        with safe_open(path, framework="pt") as file:  # the library's own checks: lengths, offsets, shapes, no gaps
            names = set(file.keys())
        fields, start = _parse(path)
        fields.pop("__metadata__", None)
        tensors = [_stored(path, name, field, start) for name, field in fields.items()]
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        size = path.stat().st_size if path.is_file() else 0
        raise CheckpointError(
            f"{path}: not a whole .safetensors file ({size} bytes; {error}): it is cut short or damaged, restore it, "
            "e.g. by downloading it again"
        ) from None
    if {tensor.name for tensor in tensors} != names:
        raise CheckpointError(f"{path}: its header names tensors twice or in an unreadable way: restore the file")
    return {tensor.name: tensor for tensor in sorted(tensors, key=lambda tensor: tensor.offset)}


def read_metadata(path: Path) -> dict[str, str]:
    """The free text of a file's header, by key. Only for files that ``read_header`` has accepted."""
    metadata = _parse(path)[0].get("__metadata__") or {}
    return {str(key): str(text) for key, text in metadata.items()}


def _parse(path: Path) -> tuple[dict[str, Any], int]:
    """The header's fields, and where the data begin. The format: 8 bytes of length, JSON, data."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        fields = json.loads(file.read(length).decode("utf-8"))
    return fields, 8 + length


def _stored(path: Path, name: str, field: dict[str, Any], start: int) -> Stored:
    begin, end = field["data_offsets"]
    shape, dtype = tuple(field["shape"]), field["dtype"]
    if dtype in DTYPES and math.prod(shape) * DTYPES[dtype].itemsize != end - begin:
        raise ValueError(f"{name} has shape {shape} of {dtype} in {end - begin} bytes")
    return Stored(name=name, dtype=dtype, shape=shape, path=path, offset=start + begin, nbytes=end - begin)


__all__ = ["DTYPES", "FLOATING", "NAMES", "Stored", "read_header", "read_metadata"]
