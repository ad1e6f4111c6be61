"""What weights are checked for: that they are those of a configuration, in dtypes that can be, and finite."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from functools import reduce

import torch
from torch import Tensor, nn

from cogx_fast.config import TransformerConfig
from cogx_fast.weights.errors import CheckpointError, some
from cogx_fast.weights.foreign import refuse_foreign
from cogx_fast.weights.headers import DTYPES
from cogx_fast.weights.layout import Slot, slots
from cogx_fast.weights.quantized import inner_tensors, is_quantized

_BLOCK = re.compile(r"transformer_blocks\.(\d{1,9})\.")
_CHECKED_AT_ONCE = 1 << 24


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


__all__ = ["check_dtype", "check_tensors", "check_values", "finite", "target_dtype"]
