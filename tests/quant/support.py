"""What the tests of quantized weights share: comparing them bit for bit."""

from __future__ import annotations

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
