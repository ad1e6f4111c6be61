"""Models in torch.compile's wrappers, whole or in part: their weights are taken, what is on a wrapper is not lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import cogx_fast
from cogx_fast.runtime.attached import AttachedError
from tests.support import inputs, small, upstream

CONFIG = small("5b")
PLACES = ["", "transformer_blocks.1", "transformer_blocks.0.ff", "proj_out"]


def wrapped(source: nn.Module, place: str) -> tuple[nn.Module, nn.Module]:
    """The model with one module in a wrapper, and the wrapper."""
    wrapper: Any = torch.compile(source.get_submodule(place), backend="eager")
    if not place:
        return wrapper, wrapper
    parent, _, last = place.rpartition(".")
    setattr(source.get_submodule(parent), last, wrapper)
    return source, wrapper


def mine(*_: Any) -> None: ...


def patch(wrapper: Any) -> None:
    before = wrapper.forward
    wrapper.forward = lambda *a, **k: before(*a, **k)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("ours", [False, True], ids=["diffusers", "ours"])
def test_weights_are_taken_from_inside_a_wrapper(ours: bool, place: str) -> None:
    plain = upstream(CONFIG)
    source, _ = wrapped(cogx_fast.load(plain) if ours else plain, place)
    model, expected = cogx_fast.load(source), cogx_fast.load(upstream(CONFIG))
    arguments = inputs(CONFIG)
    with torch.no_grad():
        assert torch.equal(model(**arguments).sample, expected(**arguments).sample)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("attach", "words"),
    [(lambda w: w.register_forward_hook(mine), "forward hook .*mine"), (patch, "a forward of its own")],
    ids=["hook", "forward"],
)
def test_what_is_on_a_wrapper_or_in_it_is_refused(attach: Callable[[Any], Any], words: str, place: str) -> None:
    for inside in (False, True):
        source, wrapper = wrapped(upstream(CONFIG), place)
        attach(wrapper._orig_mod if inside else wrapper)
        with pytest.raises(AttachedError, match=f"{words}.* on {place or 'the model'}"):
            cogx_fast.load(source)
