"""What the tests of attached things share: a small model of ours in each scope, and a call of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import cogx_fast
from tests.support import inputs, pipeline_rotary, small, upstream

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
    arguments = inputs(CONFIG, dtype=dtype)
    arguments["image_rotary_emb"] = pipeline_rotary(CONFIG, arguments["hidden_states"])
    with torch.no_grad():
        return model(**arguments, return_dict=False)[0]
