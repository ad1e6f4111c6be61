"""A model from a store of weights: checked, built on meta, then filled part by part, each part transformed as it comes.

The order is the same wherever the weights are and whatever is done to them: nothing is read before all that can be
checked has been, each of the model's tensors is allocated once (or mapped, or shared), and a failure leaves nothing
behind. Transforms run in the order in which they are given: LoRAs are merged, then the part is quantized.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from cogx_fast.config import TransformerConfig
from cogx_fast.model.transformer import CogVideoXTransformer
from cogx_fast.weights.checks import check_tensors, target_dtype
from cogx_fast.weights.layout import Slot, by_our_name
from cogx_fast.weights.quantized import Found, note_recipe

_PART = re.compile(r"transformer_blocks\.\d+|[^.]+")

Model = TypeVar("Model", bound=CogVideoXTransformer)


class Store(Protocol):
    """Where weights are: it says what there is without reading it, then gives some of our tensors at a time."""

    origin: str
    """What it is called in messages."""
    config: TransformerConfig
    found: Found
    """Shape and stored dtype of every tensor, by diffusers' names."""
    recipe: str | None
    """With which recipe weights were quantized, as TOML, where that is known."""

    @property
    def quantized(self) -> Mapping[str, torch.dtype]:
        """Our names of the weights that are quantized already, and the dtype in which each answers."""

    @property
    def device(self) -> torch.device:
        """Where the weights go if nothing else is asked for."""

    def check(self, layout: Mapping[str, Slot], dtype: torch.dtype | None, *, finite: bool) -> None:
        """Raise for what is wrong with the weights, as far as it can be told before they are read."""

    def read(
        self, names: Mapping[str, list[Slot]], dtypes: Mapping[str, torch.dtype], device: torch.device, *, stay: bool
    ) -> dict[str, tuple[Tensor, bool]]:
        """Our tensors of these names, and whether each has gradients.

        Args:
            names: what each is made of.
            dtypes: of each.
            device: where they go.
            stay: they are the model's as they are, so they may be mapped from files.
        """

    def check_read(self, model: nn.Module, names: Mapping[str, list[Slot]]) -> None:
        """Raise where a value that was read is infinite or NaN, if ``check`` could not tell."""

    def give_up(self, names: Iterable[str]) -> None:
        """Let go of weights that the model has in another form by now, if that is asked for."""


class Transform(Protocol):
    """Something that is done to weights as they come."""

    def check(self, model: CogVideoXTransformer, store: Store) -> None:
        """Raise what would stand in the way, looking at the model on the meta device, in its dtypes."""

    def apply(self, part: nn.Module, name: str) -> None:
        """Change a part of the model (a block, an embedding, …) whose weights are there; ``name`` is its name."""


def assemble(
    store: Store,
    build: Callable[[TransformerConfig], Model],
    *,
    transforms: Sequence[Transform] = (),
    check: Callable[[Model], None] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    check_finite: bool = False,
) -> Model:
    """Build a model and give it a store's weights.

    Args:
        store: the files of a checkpoint (``checkpoint.FileStore``) or a live model (``live.LiveStore``).
        build: makes the model of a configuration; called under the meta device.
        transforms: what is done to each part as soon as its weights are there, so that weights that are replaced by
            smaller ones are never all in memory.
        check: looks at the model on the meta device, in its dtypes, and raises what would stand in its way later.
        dtype: of all weights, or None to keep each as it is (slices of one fused tensor that differ are promoted to a
            dtype that holds all of them exactly, with a warning).
        device: where the weights go; None is the store's own choice.
        check_finite: look for infinities and NaN, which costs a pass over all weights.

    Raises:
        CheckpointError: damaged or foreign weights; the message says what to do.
        ValueError: what a transform's ``check`` raises.
    """
    layout = check_tensors(store.found, store.config, store.origin)
    device = device or store.device
    groups = by_our_name(layout)
    quantized = store.quantized
    dtypes = {
        name: quantized.get(name) or target_dtype(name, [store.found[slot.name][1] for slot in group], dtype)
        for name, group in groups.items()
    }
    store.check(layout, dtype, finite=check_finite)
    with torch.device("meta"):
        model = _in_dtypes(build(store.config), dtypes)
    if check is not None:
        check(model)
    for transform in transforms:
        transform.check(model, store)
    if quantized:  # already, and whether as it is asked for
        note_recipe(model, store.recipe, store.origin, asked=bool(transforms))
        transforms = ()
    for part, names in (_by_part(groups) if transforms else {"": groups}).items():
        places = _fill(model, store.read(names, dtypes, device, stay=not transforms))
        if check_finite:
            store.check_read(model, names)
        for transform in transforms:
            transform.apply(model.get_submodule(part), part)
        if transforms:
            store.give_up(name for name, place in places.items() if _place(model, name) != place)
    return model


def put(model: nn.Module, name: str, tensor: Tensor, *, requires_grad: bool = True) -> None:
    """Make a tensor the parameter or buffer of that name."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=requires_grad)
    else:
        assert leaf in module._buffers, name
        module._buffers[leaf] = tensor


def _fill(model: nn.Module, tensors: Mapping[str, tuple[Tensor, bool]]) -> dict[str, tuple[type, int]]:
    """Give the model tensors, and return where they are: a reference would keep what a transform replaces."""
    for name, (tensor, requires_grad) in tensors.items():
        put(model, name, tensor, requires_grad=requires_grad)
    return {name: _place(model, name) for name in tensors}


def _place(model: nn.Module, name: str) -> tuple[type, int]:
    path, _, leaf = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(path), leaf)
    return type(tensor.data), tensor.data_ptr()


def _by_part(groups: Mapping[str, list[Slot]]) -> dict[str, dict[str, list[Slot]]]:
    """Tensors by the part of the model they belong to: a block, or one of the modules around the blocks."""
    parts: dict[str, dict[str, list[Slot]]] = {}
    for name, group in groups.items():
        match = _PART.match(name)
        assert match is not None, name
        parts.setdefault(match[0], {})[name] = group
    return parts


def _in_dtypes(model: Model, dtypes: Mapping[str, torch.dtype]) -> Model:
    """The same model on the meta device, its tensors in these dtypes."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, dtype in dtypes.items():
        put(model, name, torch.empty_like(tensors[name], dtype=dtype))
    return model


__all__ = ["Store", "Transform", "assemble", "put"]
