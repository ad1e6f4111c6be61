"""Models in torch.compile's wrappers, whole or in part: their weights are taken, what is on a wrapper is not lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import cogx_fast
from tests.cases import for_each
from tests.runtime.attached import CONFIG, mine, refused, run
from tests.support import upstream

PLACES = ["", "transformer_blocks.1", "transformer_blocks.0.ff", "proj_out"]


def wrapped(source: nn.Module, place: str) -> tuple[nn.Module, nn.Module]:
    """The model with one module in a wrapper, and the wrapper."""
    wrapper: Any = torch.compile(source.get_submodule(place), backend="eager")
    if not place:
        return wrapper, wrapper
    parent, _, last = place.rpartition(".")
    setattr(source.get_submodule(parent), last, wrapper)
    return source, wrapper


def patch(wrapper: Any) -> None:
    before = wrapper.forward
    wrapper.forward = lambda *a, **k: before(*a, **k)


@for_each("place", PLACES, "ours", [False, True])
def test_weights_are_taken_from_inside_a_wrapper(ours: bool, place: str) -> None:
    plain = upstream(CONFIG)
    source, _ = wrapped(cogx_fast.load(plain) if ours else plain, place)
    model, expected = cogx_fast.load(source), cogx_fast.load(upstream(CONFIG))
    assert torch.equal(run(model), run(expected))


@for_each(
    "place",
    PLACES,
    "attach, words",
    [(lambda w: w.register_forward_hook(mine), "forward hook .*mine"), (patch, "a forward of its own")],
)
def test_what_is_on_a_wrapper_or_in_it_is_refused(attach: Callable[[Any], Any], words: str, place: str) -> None:
    for inside in (False, True):
        source, wrapper = wrapped(upstream(CONFIG), place)
        attach(wrapper._orig_mod if inside else wrapper)
        refused(source, f"{words}.* on {place or 'the model'}")
