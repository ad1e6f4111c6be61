"""Weights in memory under diffusers' names, out of a model and into it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cogx_fast.config import TransformerConfig
from cogx_fast.weights.errors import CheckpointError
from cogx_fast.weights.layout import Slot, by_our_name, our_shape, slots
from cogx_fast.weights.live import check_ours
from cogx_fast.weights.quantized import is_quantized, parted


def in_upstream_names(tensors: Mapping[str, Tensor], config: TransformerConfig, origin: str) -> dict[str, Tensor]:
    """Our tensors as diffusers has them, views of the given ones, in its order.

    Raises:
        CheckpointError: they are not those of the configuration, or one is of a kind that cannot be parted.
    """
    check_ours(tensors, config, origin)
    layout = slots(config)
    found: dict[str, Tensor] = {}
    for name, group in by_our_name(layout).items():
        tensor = tensors[name]
        if is_quantized(tensor):
            found |= parted(name, tensor, group, origin)
        else:
            found |= {slot.name: slot.view(tensor) for slot in group}
    return {name: found[name] for name in layout}


@torch.no_grad()
def in_our_names(
    model: nn.Module, config: TransformerConfig, given: Mapping[str, Any], *, strict: bool
) -> tuple[dict[str, Tensor], list[str], list[str]] | None:
    """A state dict in diffusers' names as one in ours; None where no name in it is diffusers' alone.

    Args:
        model: of that configuration, whose values stand in where only some rows of a tensor of ours are given.
        given: the state dict.
        strict: whether all names have to be there, and no other.

    Returns:
        The tensors by our names; diffusers' names that are missing; names that do not belong to it.

    Raises:
        RuntimeError: in torch's words, before anything is loaded: names or shapes are not the model's.
        CheckpointError: the model is quantized.
    """
    layout = slots(config)
    if not any(name in layout and _is_upstreams(layout[name], tensor) for name, tensor in given.items()):
        return None
    missing = [name for name in layout if name not in given]
    unexpected = [name for name in given if name not in layout]
    wrong = [
        f"size mismatch for {name}: copying a param with shape {tuple(given[name].shape)} from checkpoint, the shape "
        f"in current model is {slot.shape}."
        for name, slot in layout.items()
        if name in given and tuple(given[name].shape) != slot.shape
    ]
    if strict and unexpected:
        wrong.append(f"Unexpected key(s) in state_dict: {_quoted(unexpected)}. ")
    if strict and missing:
        wrong.append(f"Missing key(s) in state_dict: {_quoted(missing)}. ")
    if wrong:
        raise RuntimeError(f"Error(s) in loading state_dict for {type(model).__name__}:\n\t" + "\n\t".join(wrong))
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    translated: dict[str, Tensor] = {}
    for name, group in by_our_name(layout).items():
        there = [slot for slot in group if slot.name in given]
        if not there:
            continue
        if is_quantized(own[name]):
            raise CheckpointError(
                f"the model's {name} is quantized, and weights under diffusers' names are not: load them with "
                "cogx_fast.load(..., quant=...)"
            )
        if len(group) == 1:
            translated[name] = given[group[0].name].reshape(our_shape(config, group))
        elif len(there) == len(group):
            translated[name] = torch.cat([given[slot.name] for slot in group])
        else:
            translated[name] = own[name].detach().clone()
            for slot in there:
                slot.view(translated[name]).copy_(given[slot.name])
    return translated, missing, unexpected


def _is_upstreams(slot: Slot, tensor: Any) -> bool:
    """Whether name and shape are diffusers' and not ours as well."""
    if slot.name != slot.our_name:
        return True
    return slot.name == "patch_embed.proj.weight" and isinstance(tensor, Tensor) and tensor.dim() == 4


def _quoted(names: list[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)


__all__ = ["in_our_names", "in_upstream_names"]
