"""diffusers' ``EMAModel`` between our parameters and its own transformer's.

It pairs parameters by their place alone, and training scripts name diffusers' class as what the averages are saved and
read with, whose parameters are others (``weights.layout``): so averages have to change their layout on the way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cogx_fast.config import TransformerConfig
from cogx_fast.model.transformer import CogVideoXTransformer


def follow_layout(method: Callable[[Any, Iterable[Tensor]], None]) -> Callable[[Any, Iterable[Tensor]], None]:
    """A method of ``EMAModel`` that takes parameters, with its averages brought into their layout first.

    It does nothing but where averages and parameters are in the one layout and the other of the model's configuration.
    """

    @functools.wraps(method)
    def run(average: Any, parameters: Iterable[Tensor]) -> None:
        if not isinstance(parameters, torch.nn.Module):
            parameters = list(parameters)
            average.shadow_params = _in_layout_of(parameters, average.shadow_params, average.model_config)
        method(average, parameters)

    return run


def _in_layout_of(parameters: Sequence[Tensor], averages: Sequence[Tensor], config: Any) -> Sequence[Tensor]:
    wanted, given = _shapes(parameters), _shapes(averages)
    if wanted == given or not isinstance(config, Mapping):
        return averages
    from cogx_fast.weights.layout import by_our_name, slots

    fields = {name: config[name] for name in TransformerConfig.__dataclass_fields__ if name in config}
    built = TransformerConfig(**fields)
    layout = {name: slot for name, slot in slots(built).items() if name != "patch_embed.pos_embedding"}  # a buffer
    with torch.device("meta"):
        ours = {name: tuple(tensor.shape) for name, tensor in CogVideoXTransformer(built).named_parameters()}
    theirs = [slot.shape for slot in layout.values()]
    if (given, wanted) == ([*ours.values()], theirs):
        held = dict(zip(ours, averages, strict=True))
        return [slot.view(held[slot.our_name]) for slot in layout.values()]
    if (given, wanted) == (theirs, [*ours.values()]):
        held, groups = dict(zip(layout, averages, strict=True)), by_our_name(layout)
        return [
            torch.cat([held[slot.name] for slot in groups[name]]) if len(groups[name]) > 1 else
            held[groups[name][0].name].view(shape)
            for name, shape in ours.items()
        ]  # fmt: skip
    return averages


def _shapes(tensors: Sequence[Tensor]) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in tensors]


__all__ = ["follow_layout"]
