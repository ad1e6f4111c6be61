"""A model from the files of a checkpoint: everything is checked from the headers, then built on meta, then filled.

Nothing is allocated before the checks have passed, each of the model's tensors is allocated once (or mapped), and a
failure leaves nothing behind.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from typing import TypeVar

import torch
from torch import Tensor, nn

from cogx_fast.config import TransformerConfig
from cogx_fast.model.transformer import CogVideoXTransformer
from cogx_fast.weights.errors import CheckpointError, some
from cogx_fast.weights.foreign import bare_names, refuse_foreign
from cogx_fast.weights.headers import DTYPES, Stored
from cogx_fast.weights.layout import Slot, by_our_name, our_shape, slots
from cogx_fast.weights.quantized import Weight, check_same, describe, inner_tensors, is_quantized, note_recipe
from cogx_fast.weights.reading import Maps, announce, is_run, read
from cogx_fast.weights.sources import Source

_BLOCK = re.compile(r"transformer_blocks\.(\d{1,9})\.")
_PART = re.compile(r"transformer_blocks\.\d+|[^.]+")
_CHECKED_AT_ONCE = 1 << 24

Model = TypeVar("Model", bound=CogVideoXTransformer)
Finish = Callable[[nn.Module, str], object]
"""Called with each part of a model (a block, an embedding, …) and its name, once its weights are there."""


def load_checkpoint(
    source: Source,
    build: Callable[[TransformerConfig], Model],
    *,
    dtype: torch.dtype | None,
    device: torch.device,
    check_finite: bool = False,
    prepare: Callable[[Model], Finish] | None = None,
) -> Model:
    """Build a model and give it a checkpoint's weights.

    Args:
        source: the files.
        build: makes the model of a configuration; called under the meta device.
        dtype: dtype of all weights, or None to keep each as it is stored (slices of one fused tensor that differ are
            promoted to a dtype that holds all of them exactly, with a warning).
        device: where the weights go.
        check_finite: look for infinities and NaN, which costs a pass over all weights.
        prepare: called with the model on the meta device, in its dtypes, before anything is allocated; what it returns
            is called with each part of the model as soon as its weights are there, so that weights it replaces by
            smaller ones are never all in memory. Nothing stays mapped then.

    Raises:
        CheckpointError: damaged or foreign files; the message says what to do.
    """
    origin = str(source.weights)
    stored, origin = _without_prefixes(source.headers(), origin)
    quantized = describe(stored, source.metadata(stored), source.config, origin)
    found = quantized.found if quantized else {name: (t.shape, t.dtype) for name, t in stored.items()}
    layout = check_tensors(found, source.config, origin)
    weights = quantized.weights if quantized else {}
    groups = {name: group for name, group in by_our_name(layout).items() if name not in weights}
    dtypes = {
        name: target_dtype(name, [stored[slot.name].dtype for slot in group], dtype) for name, group in groups.items()
    }
    for name, weight in weights.items():
        check_dtype(name, weight.dtype, dtype, origin)
        check_same(weight, origin)
    announce({tensor.path for tensor in stored.values()})
    with torch.device("meta"):
        model = build(source.config)
    finish = None if prepare is None else prepare(in_dtypes(model, dtypes | {n: w.dtype for n, w in weights.items()}))
    if quantized:  # already: whether as it is asked for
        finish = None
        note_recipe(model, quantized.recipe, origin, asked=prepare is not None)
    maps = Maps()

    def fill(names: Iterable[str], pieces: list[tuple[Stored, Tensor]]) -> None:
        for name in names:
            group = groups[name]
            parts, shape = [stored[slot.name] for slot in group], our_shape(source.config, group)
            if finish is None and device.type == "cpu" and DTYPES[parts[0].dtype] == dtypes[name] and is_run(parts):
                put(model, name, maps.tensor(parts, shape))
                continue
            tensor = torch.empty(shape, dtype=dtypes[name], device=device)
            put(model, name, tensor)
            pieces += [(part, slot.view(tensor)) for part, slot in zip(parts, group, strict=True)]
        read(pieces)
        if check_finite:
            chosen = {*names, *(weights if finish is None else ())}
            check_values(model, {name: slot for name, slot in layout.items() if slot.our_name in chosen}, origin)

    if finish is None:
        fill(groups, [piece for weight in weights.values() for piece in place(model, weight, maps, device)])
        return model
    for part, names in by_part(groups).items():
        fill(names, [])
        finish(model.get_submodule(part), part)
    return model


def _without_prefixes(stored: dict[str, Stored], origin: str) -> tuple[dict[str, Stored], str]:
    """A checkpoint's tensors by the names that a model's own have, and what to call it in messages."""
    bare = bare_names(stored)
    changed = next((name for name, rest in bare.items() if rest != name), None)
    if changed is None or len(set(bare.values())) < len(bare):
        return stored, origin
    named = {bare[name]: dataclasses.replace(one, name=bare[name]) for name, one in stored.items()}
    return named, f"{origin} ({changed!r} read as {bare[changed]!r}, and so all names)"


def place(model: nn.Module, weight: Weight, maps: Maps, device: torch.device) -> list[tuple[Stored, Tensor]]:
    """Give a model one of its quantized weights; returns what is still to be read into it."""
    tensor, pieces = weight.pieces(maps, device)
    put(model, weight.name, tensor, requires_grad=False)
    return pieces


def by_part(names: Iterable[str]) -> dict[str, list[str]]:
    """Tensors' names by the part of the model they belong to: a block, or one of the modules around the blocks."""
    parts: dict[str, list[str]] = {}
    for name in names:
        match = _PART.match(name)
        assert match is not None, name
        parts.setdefault(match[0], []).append(name)
    return parts


def in_dtypes(model: Model, dtypes: Mapping[str, torch.dtype]) -> Model:
    """The same model on the meta device, its tensors in these dtypes."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, dtype in dtypes.items():
        put(model, name, torch.empty_like(tensors[name], dtype=dtype))
    return model


def check_tensors(
    found: Mapping[str, tuple[tuple[int, ...], str]], config: TransformerConfig, origin: str
) -> dict[str, Slot]:
    """The layout of a configuration, if tensors of these names, shapes and stored dtypes are exactly its own.

    Raises:
        CheckpointError: they are not; the first few names are in the message.
    """
    refuse_foreign(found, origin)
    blocks = 1 + max((int(match[1]) for name in found if (match := _BLOCK.match(name))), default=-1)
    if blocks != config.num_layers:
        raise CheckpointError(
            f"{origin}: holds {blocks} transformer blocks, but its config says num_layers={config.num_layers}: weights "
            "and config are not of one model, restore them"
        )
    expected = slots(config)
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    wrong = [
        f"{name} {tuple(found[name][0])} in place of {slot.shape}"
        for name, slot in expected.items()
        if name in found and tuple(found[name][0]) != slot.shape
    ]
    problems = [(missing, "are missing"), (extra, "do not belong to it"), (wrong, "have another shape")]
    words = "; ".join(f"{len(names)} {verb}: {some(names)}" for names, verb in problems if names)
    if words:
        raise CheckpointError(
            f"{origin}: its tensors are not those of its config. Of {len(expected)} tensors {words}. Restore the "
            "files, or give the config they belong to"
        )
    return expected


def target_dtype(name: str, stored: Iterable[str], dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of one of our tensors, made of slices of these stored dtypes.

    Raises:
        CheckpointError: 8-bit floats with no dtype to convert to.
    """
    if dtype is not None:
        return dtype
    kinds = sorted(set(stored))
    if any(DTYPES[kind].itemsize == 1 for kind in kinds):
        raise CheckpointError(
            f"{name} is stored as {', '.join(kinds)}, in which nothing can be computed: pass dtype='bf16' to convert it"
        )
    promoted = reduce(torch.promote_types, [DTYPES[kind] for kind in kinds])
    if len(kinds) > 1:
        warnings.warn(
            f"{name} is one tensor made of slices stored as {', '.join(kinds)}; it is loaded as {promoted}, which "
            "holds all of them exactly. Pass dtype=... to choose",
            stacklevel=2,
        )
    return promoted


def check_dtype(name: str, stored: torch.dtype, dtype: torch.dtype | None, origin: str) -> None:
    """Raise ``CheckpointError`` where quantized weights are asked for in another dtype than they were made of."""
    if dtype is not None and dtype != stored:
        raise CheckpointError(
            f"{origin}: dtype={dtype} is asked for, but {name} was quantized from {stored} and answers in it: leave "
            "dtype out (and call model.to(dtype) afterwards if its activations shall have another)"
        )


def put(model: nn.Module, name: str, tensor: Tensor, *, requires_grad: bool = True) -> None:
    """Make a tensor the parameter or buffer of that name."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=requires_grad)
    else:
        assert leaf in module._buffers, name
        module._buffers[leaf] = tensor


@torch.no_grad()
def check_values(model: nn.Module, layout: Mapping[str, Slot], origin: str) -> None:
    """Raise ``CheckpointError`` where a weight is infinite or NaN."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    names = dict.fromkeys(slot.our_name for slot in layout.values())
    quantized = {name for name in names if is_quantized(tensors[name])}
    bad = [name for name in quantized if not finite(tensors[name])]
    bad += [
        name
        for name, slot in layout.items()
        if slot.our_name not in quantized and not finite(slot.view(tensors[slot.our_name]))
    ]
    if bad:
        raise CheckpointError(
            f"{origin}: {len(bad)} tensors hold infinite or NaN weights: {some(bad)}. Restore the files, or choose a "
            "dtype of wider range (bfloat16 in place of float16)"
        )


def finite(tensor: Tensor) -> bool:
    """Whether no value, or scale of quantized values, is infinite or NaN."""
    if is_quantized(tensor):
        return all(map(finite, inner_tensors(tensor)))
    parts = tensor.reshape(-1).split(_CHECKED_AT_ONCE) if tensor.is_floating_point() else ()
    return all((part.float() if part.itemsize == 1 else part).isfinite().all() for part in parts)


__all__ = [
    "Finish", "by_part", "check_dtype", "check_tensors", "check_values", "finite", "in_dtypes", "load_checkpoint",
    "put", "target_dtype",
]  # fmt: skip
