"""What the tests of weights share: checkpoints by diffusers' own hand, and weights compared bit for bit."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cogx_fast.config import TransformerConfig
from cogx_fast.weights.layout import slots
from quant import storage
from tests.quant.support import assert_same_weight
from tests.support import upstream

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = WEIGHTS + ".index.json"


def save_upstream(config: TransformerConfig, directory: Path, **options: Any) -> dict[str, Tensor]:
    """Have diffusers save a model of that configuration; returns its state dict."""
    model = upstream(config)
    model.save_pretrained(directory, **options)
    return model.state_dict()


def diffusers_view(model: nn.Module) -> dict[str, Tensor]:
    """Our model's weights under diffusers' names and in its shapes, for every tensor there is."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {slot.name: slot.view(tensors[slot.our_name].detach()) for slot in slots(model.config).values()}


def assert_same_bits(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Same names, shapes, dtypes and bits."""
    assert actual.keys() == expected.keys()
    different = [name for name, tensor in expected.items() if not same_bits(actual[name], tensor)]
    assert not different


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Also where values are NaN."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(*(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8) for tensor in (one, other)))


def assert_same_model(one: nn.Module, other: nn.Module) -> None:
    """Every tensor bit for bit, the quantized ones with all that they are made of."""
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        if storage.is_quantized(tensor):
            assert_same_weight(second[name], tensor)
        else:
            assert same_bits(tensor, second[name]), name


def from_upstream(directory: Path, **options: Any) -> Any:
    """Unmodified diffusers' model from a directory, with each weight's dtype as stored where it can be."""
    from diffusers import CogVideoXTransformer3DModel

    return CogVideoXTransformer3DModel.from_pretrained(directory, **options).eval()


@functools.cache
def small_state(seed: int = 0) -> dict[str, Tensor]:
    """A state dict of ``small("5b")``."""
    from tests.support import small

    return upstream(small("5b"), seed=seed).state_dict()
