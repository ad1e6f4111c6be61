"""What torchao's quantized weights leave undone when a model is moved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def follow_dtype(model: nn.Module, convert: Callable[[Tensor], Tensor]) -> None:
    """Give quantized weights the dtype that ``model.to(dtype)`` gave all others; theirs is what products come out in.

    torchao moves them to another device, but keeps their dtype, and products then meet activations of another one.

    Args:
        model: after ``convert`` was applied to its weights.
        convert: what ``model.to`` does to a tensor.
    """
    for module in model.modules():
        for name, parameter in module._parameters.items():
            weight: Any = parameter
            if not hasattr(weight, "__tensor_flatten__"):
                continue
            dtype = convert(torch.empty(0, dtype=weight.dtype, device=weight.device)).dtype
            names, attributes = weight.__tensor_flatten__()
            if dtype != weight.dtype and "dtype" in attributes:
                parts = {each: getattr(weight, each) for each in names}
                changed = type(weight).__tensor_unflatten__(
                    parts, {**attributes, "dtype": dtype}, weight.shape, weight.stride()
                )
                module._parameters[name] = nn.Parameter(changed, requires_grad=False)


__all__ = ["follow_dtype"]
