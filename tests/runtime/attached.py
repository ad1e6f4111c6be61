"""What the tests of attached things share: a small model of ours in each scope, a call of it, and a refusal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cogx_fast
from cogx_fast.runtime.attached import AttachedError
from tests.model.pairs import call
from tests.support import predict, small, upstream

CONFIG = small("5b")
SCOPES: dict[str, Any] = {
    "eager": False,
    "block": cogx_fast.CompileConfig(backend="eager"),
    "model": cogx_fast.CompileConfig(backend="eager", scope="model"),
    "unrolled": cogx_fast.CompileConfig(backend="eager", scope="model", unrolled=True),
}


def build(scope: str = "eager", **changes: Any) -> Any:
    return cogx_fast.load(upstream(CONFIG), compile=SCOPES[scope], **changes)


def run(model: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    return predict(model, call(CONFIG, dtype=dtype))


def mine(*_: Any, **__: Any) -> None:
    """A user's hook."""


def refused(source: nn.Module, words: str) -> None:
    """Loading from it names what is on it and the remedy, and leaves its weights alone."""
    before = {name: tensor.data_ptr() for name, tensor in source.named_parameters()}
    with pytest.raises(AttachedError, match=f"(?s){words}.*What to do: "):
        cogx_fast.load(source)
    assert {name: tensor.data_ptr() for name, tensor in source.named_parameters()} == before
