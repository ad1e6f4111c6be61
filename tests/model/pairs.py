"""Upstream's model and ours with the same weights, and the calls and comparisons that the parity tests share."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cogx_fast.config import TransformerConfig
from cogx_fast.runtime.module import CogVideoXModel
from cogx_fast.weights.layout import slots
from tests.support import inputs, pipeline_rotary, relative_error, small, upstream

TOLERANCE = 1e-5
"""Relative error allowed in fp32, for outputs and gradients, everywhere."""

ADDED_POSITIONS = ("2b", "5b-i2v")
CONVOLVED = ("2b", "5b", "5b-i2v")

_LIVELY = {  # gains that make attention, rotation and text count for some per cent of the output, as in trained models
    "to_q": 3**0.5, "to_k": 3**0.5, "to_v": 3**0.5, "to_out.0": 3**0.5, "norm_q": 1.5, "norm_k": 1.5,
    "ff.net.0.proj": 3**0.5, "ff.net.2": 3**0.5, "norm1.linear": 2.0, "norm2.linear": 2.0, "text_proj": 3**0.5,
}  # fmt: skip


class Pair(NamedTuple):
    """Two models that should be one; shared between tests, so not to be changed (``copy.deepcopy`` first)."""

    config: TransformerConfig
    theirs: Any
    ours: CogVideoXModel

    def error(self, arguments: dict[str, Any], **more: Any) -> float:
        """Relative error of our output against upstream's, for the same arguments."""
        with torch.no_grad():
            return relative_error(self.ours(**arguments, **more).sample, self.theirs(**arguments, **more).sample)


def lively_upstream(config: TransformerConfig, *, seed: int = 0) -> Any:
    """``support.upstream`` with weights large enough that no part of the model can be left out unnoticed."""
    model = upstream(config, seed=seed)
    with torch.no_grad():
        for name, module in model.named_modules():
            for ending, gain in _LIVELY.items():
                if name.endswith(ending):
                    module.weight.mul_(gain)
    return model


def copy_of(theirs: Any, config: TransformerConfig, **kwargs: Any) -> CogVideoXModel:
    """Our model with a copy of upstream's weights; every one of our tensors is filled, each value once."""
    ours = CogVideoXModel(config, **kwargs)
    own, theirs_state, layout = ours.state_dict(), theirs.state_dict(), slots(config)
    assert layout.keys() == theirs_state.keys()
    assert sum(t.numel() for t in own.values()) == sum(t.numel() for t in theirs_state.values())
    with torch.no_grad():
        for tensor in own.values():
            tensor.fill_(torch.nan)
        for name, slot in layout.items():
            slot.view(own[slot.our_name]).copy_(theirs_state[name])
    assert all(t.isfinite().all() for t in own.values())
    return ours.train(theirs.training)


def new_pair(config: TransformerConfig, *, seed: int = 0) -> Pair:
    theirs = lively_upstream(config, seed=seed)
    return Pair(config, theirs, copy_of(theirs, config))


@functools.cache
def pair(name: str, *, seed: int = 0, **changes: Any) -> Pair:
    """A released variant at toy size, made once for each set of arguments."""
    return new_pair(small(name, **changes), seed=seed)


def with_tables(config: TransformerConfig, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments as a pipeline gives them: with rotary tables where the model has rotary positions."""
    return arguments | {"image_rotary_emb": pipeline_rotary(config, arguments["hidden_states"])}


def call(config: TransformerConfig, **kwargs: Any) -> dict[str, Any]:
    """Arguments of one call as a pipeline makes it."""
    return with_tables(config, inputs(config, **kwargs))


def to_dtype(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Arguments with floating tensors in ``dtype``; rotary tables stay as they are."""
    return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in arguments.items()}
