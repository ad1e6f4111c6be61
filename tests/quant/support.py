"""What the tests of quantized weights share: comparing them bit for bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from quant import storage


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def assert_same_weight(one: Tensor, other: Tensor) -> None:
    """Same class, attributes and inner bits."""
    first, second = storage.flatten(one), storage.flatten(other)
    assert type(one) is type(other)
    assert (one.shape, one.dtype, first.description) == (other.shape, other.dtype, second.description)
    assert first.parts.keys() == second.parts.keys()
    for name, part in first.parts.items():
        assert part.dtype == second.parts[name].dtype
        assert torch.equal(bits(part), bits(second.parts[name])), name


def checksum(entries: Mapping[str, str]) -> str:
    """Of a file's metadata, as the format has it."""
    return hashlib.sha256(json.dumps(dict(sorted(entries.items()))).encode()).hexdigest()


def without_onednn() -> AbstractContextManager[object]:
    """Products by torch's own code.

    oneDNN's of fp8 weights with one scale, which torch takes where cpuinfo sees AMX, is a loop (400 times the time),
    and fails where ONEDNN_MAX_CPU_ISA hides AVX512-FP16 from oneDNN alone.
    """
    return torch.backends.mkldnn.flags(enabled=False)
