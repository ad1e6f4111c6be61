"""Quantized weights in a checkpoint: torchao's flattened layout under diffusers' names, both ways.

The rows of a quantized tensor of ours are stored as the several weights that diffusers has for them (its own quantizer
for torchao reads such files), next to each other in the file, so that here the whole is one mapped run. A kind that
cannot be parted by rows (packed int4) is stored whole under our name, for this package alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cogx_fast.config import TransformerConfig
from cogx_fast.weights.errors import CheckpointError, some
from cogx_fast.weights.headers import DTYPES, NAMES, Stored
from cogx_fast.weights.layout import Slot, by_our_name, our_shape, slots
from cogx_fast.weights.reading import Maps, is_run

if TYPE_CHECKING:
    from quant.storage import Written

Found = dict[str, tuple[tuple[int, ...], str]]
"""Shape and stored dtype by name, as ``check_tensors`` takes them."""

_MARK = "tensor_names"
"""A key in the metadata of files in torchao's layout."""


@contextmanager
def naming(origin: str) -> Iterator[None]:
    """Errors about quantized weights as errors about that checkpoint."""
    from quant.errors import QuantError

    try:
        yield
    except QuantError as error:
        raise CheckpointError(f"{origin}: {error}") from None


def is_quantized(tensor: Tensor) -> bool:
    """Whether a tensor is one of torchao's quantized ones."""
    if type(tensor) in (Tensor, torch.nn.Parameter):  # without importing torchao
        return False
    from quant import storage

    return storage.is_quantized(tensor)


def note_recipe(model: nn.Module, recipe: str | None, origin: str, *, asked: bool = False) -> None:
    """Have a model of quantized weights remember with which recipe they were.

    Args:
        model: to remember it, or as it is the one that the user asks for.
        recipe: the weights', as TOML, where it is known.
        origin: the weights', for messages.
        asked: whether the user asks for one.

    Raises:
        CheckpointError: the user asks for another one.
    """
    from quant.apply import recipe_of, remember
    from quant.recipe import parse_recipe

    with naming(origin):
        known = None if recipe is None else parse_recipe(recipe, origin=f"the recipe in {origin}")
    wanted = recipe_of(model) if asked else None
    if wanted is not None and (known is None or known.rules != wanted.rules):
        raise CheckpointError(
            f"{origin}: is quantized already, with {'an unknown recipe' if known is None else repr(known.name)}, and "
            f"quant asks for {wanted.name!r}: leave quant out, or load the original checkpoint with it"
        )
    if known is not None:
        remember(model, known)


def recipe_text(model: nn.Module) -> str | None:
    """The recipe that a model was quantized with, as TOML."""
    if not any(is_quantized(parameter) for parameter in model.parameters()):
        return None
    from quant.apply import recipe_of

    recipe = recipe_of(model)
    return None if recipe is None else recipe.to_toml()


def inner_tensors(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that a quantized one is made of."""
    from quant import storage

    return list(storage.inner_tensors(tensor).values())


# ------------------------------------------------------------------------------------------------- from files


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A quantized tensor of ours, in files."""

    name: str
    description: str
    written: Written
    runs: dict[str, list[Stored]]
    """By inner tensor: what its rows are, in their order."""
    dtype: torch.dtype
    """In which it answers."""
    same: list[list[Stored]] = field(default_factory=list)
    """Inner tensors that stand with each of several parts, and must be alike."""

    def pieces(self, maps: Maps, device: torch.device) -> tuple[Tensor, list[tuple[Stored, Tensor]]]:
        """The weight, mapped or not yet filled, and what is to be read into it."""
        from quant import storage

        parts, pieces = {}, []
        for part, run in self.runs.items():
            shape = (sum(stored.shape[0] for stored in run), *run[0].shape[1:]) if len(run) > 1 else run[0].shape
            if device.type == "cpu" and is_run(run):
                parts[part] = maps.tensor(run, shape)
                continue
            parts[part] = torch.empty(shape, dtype=DTYPES[run[0].dtype], device=device)
            rows = parts[part].split([stored.shape[0] for stored in run]) if len(run) > 1 else [parts[part]]
            pieces += list(zip(run, rows, strict=True))
        return storage.restore(self.name, parts, self.written, self.description), pieces


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """A checkpoint with quantized weights, as its headers and metadata describe it; no weight is read yet."""

    recipe: str | None
    """TOML, where one was stored."""
    found: Found
    """Every tensor, the quantized ones as if they were not."""
    weights: dict[str, Weight]
    """The quantized tensors of ours, by our name."""

    @property
    def parameters(self) -> int:
        """How many there are, as if nothing were quantized, without buffers."""
        return sum(math.prod(shape) for name, (shape, _) in self.found.items() if not name.endswith("pos_embedding"))


def describe(
    stored: Mapping[str, Stored], metadata: Sequence[Mapping[str, str]], config: TransformerConfig, origin: str
) -> Quantized | None:
    """What is quantized in a checkpoint of these tensors and each file's metadata; None where nothing is.

    Raises:
        CheckpointError: metadata and tensors do not fit each other, or torchao cannot read them.
    """
    if not any(_MARK in texts for texts in metadata):
        return None
    from quant import storage

    contents = [{key: text for key, text in texts.items() if key != "format"} for texts in metadata]
    if any(content != contents[0] for content in contents):
        raise CheckpointError(f"{origin}: its shards are not of one save (their metadata differ): restore them")
    with naming(origin):
        written = storage.unpack(metadata[0])
        assert written is not None
        parts = {name: storage.part_names(name, text) for name, text in written.descriptions.items()}
        absent = sorted({flat for names in parts.values() for flat in names.values()} - stored.keys())
        if absent:
            raise CheckpointError(f"{origin}: parts of quantized weights are missing ({some(absent)}): restore it")
        inner = {flat for names in parts.values() for flat in names.values()}
        found: Found = {name: (tensor.shape, tensor.dtype) for name, tensor in stored.items() if name not in inner}
        runs = {name: {part: stored[flat] for part, flat in names.items()} for name, names in parts.items()}
        for name, names in runs.items():
            weight = _on_meta(name, {part: [one] for part, one in names.items()}, written, written.descriptions[name])
            found[name] = (tuple(weight.shape), NAMES.get(weight.dtype, str(weight.dtype)))
        weights = {}
        for name, group in by_our_name(slots(config)).items():
            sources = _sources(name, group, our_shape(config, group), found, written.descriptions, origin)
            if sources:
                weights[name] = _joined(name, sources, runs, found, written)
    return Quantized(recipe=written.recipe, found=found, weights=weights)


def _sources(
    name: str,
    group: list[Slot],
    shape: tuple[int, ...],
    found: Found,
    quantized: Mapping[str, str],
    origin: str,
) -> list[str]:
    """Names of the quantized weights that make up one of our tensors; none where it is plain."""
    if name in quantized and found[name][0] == shape:  # whole: it is there for all of its slots
        dtype = found.pop(name)[1]
        found.update({slot.name: (slot.shape, dtype) for slot in group})
        return [name]
    names = [slot.name for slot in group]
    inside = [name for name in names if name in quantized]
    if 0 < len(inside) < len(names):
        raise CheckpointError(
            f"{origin}: {some(inside, 2)} are quantized and {some([n for n in names if n not in inside], 2)} are not, "
            "which are one weight here: quantize the original checkpoint"
        )
    return inside


def _joined(
    name: str,
    sources: list[str],
    stored: Mapping[str, Mapping[str, Stored]],
    found: Found,
    written: Written,
) -> Weight:
    from quant import storage

    descriptions = [written.descriptions[source] for source in sources]
    if len(sources) == 1:
        runs = {part: [one] for part, one in stored[sources[0]].items()}
        dtype = _on_meta(name, runs, written, descriptions[0]).dtype
        return Weight(name=name, description=descriptions[0], written=written, runs=runs, dtype=dtype)
    rows = [found[source][0][0] for source in sources]
    description, runs, same = storage.join(descriptions, rows), {}, []
    for part in stored[sources[0]]:
        run = [stored[source][part] for source in sources]
        by_rows = all(storage.is_by_rows(part, one.shape, count) for one, count in zip(run, rows, strict=True))
        runs[part] = run if by_rows else run[:1]
        if not by_rows:
            same.append(run)
    dtype = _on_meta(name, runs, written, description).dtype
    return Weight(name=name, description=description, written=written, runs=runs, same=same, dtype=dtype)


def _on_meta(name: str, runs: Mapping[str, Sequence[Stored]], written: Written, description: str) -> Tensor:
    """The weight without its values: whether it can be made, and what it will be."""
    from quant import storage

    parts = {}
    for part, run in runs.items():
        if any(one.dtype not in DTYPES for one in run) or any(one.shape[1:] != run[0].shape[1:] for one in run):
            raise written.refuse(f"{name}: {part} is stored as {some(f'{one.dtype} {one.shape}' for one in run)}")
        shape = (sum(one.shape[0] for one in run), *run[0].shape[1:]) if len(run) > 1 else run[0].shape
        parts[part] = torch.empty(shape, dtype=DTYPES[run[0].dtype], device="meta")
    return storage.restore(name, parts, written, description)


def check_same(weight: Weight, origin: str) -> None:
    """Raise ``CheckpointError`` where what several parts have in common is not alike."""
    for run in weight.same:
        values = set()
        for stored in run:
            with stored.path.open("rb") as file:
                file.seek(stored.offset)
                values.add(file.read(stored.nbytes))
        if len(values) > 1:
            raise CheckpointError(
                f"{origin}: {some([stored.name for stored in run])} differ, but are of one weight here: quantize the "
                "original checkpoint here"
            )


# ------------------------------------------------------------------------------------------ from live models


def check_alike(name: str, parts: Sequence[Tensor], origin: str) -> None:
    """Raise ``CheckpointError`` where quantized weights of diffusers' cannot be one of ours."""
    if len(parts) == 1:
        return
    from quant import storage

    flat = [storage.flatten(part) for part in parts]
    rows = [part.shape[0] for part in parts]
    with naming(f"{origin}: {name}"):
        storage.join([one.description for one in flat], rows)
    for key, first in flat[0].parts.items():
        if storage.is_by_rows(key, first.shape, rows[0]):
            continue
        if not all(torch.equal(one.parts[key], first) for one in flat):
            raise CheckpointError(
                f"{origin}: what is {name} here was quantized apart, each part with a {key} of its own: load the "
                "original checkpoint and quantize it here"
            )


@torch.no_grad()
def taken(name: str, parts: Sequence[Tensor], device: torch.device) -> Tensor:
    """Our quantized tensor of a live model's: shared, or made once and shared back, or copied to another device."""
    from quant import storage

    stays = parts[0].device == device
    if len(parts) == 1:
        return parts[0].detach() if stays else parts[0].detach().to(device)
    flat = [storage.flatten(part) for part in parts]
    rows = [part.shape[0] for part in parts]
    joined: dict[str, Tensor] = {}
    for key, first in flat[0].parts.items():
        if not storage.is_by_rows(key, first.shape, rows[0]):
            joined[key] = first.to(device)
            continue
        joined[key] = torch.cat([one.parts[key].to(device) for one in flat])
        if stays:
            for part, own in zip(parts, joined[key].split(rows), strict=True):
                setattr(part, key, own)
    written = storage.Written(descriptions={}, recipe=None, torchao=storage.torchao_version())
    return storage.restore(name, joined, written, storage.join([one.description for one in flat], rows))


def parted(name: str, whole: Tensor, group: list[Slot], origin: str) -> dict[str, Tensor]:
    """A quantized tensor of ours as diffusers' several, on the same memory."""
    from quant import storage

    with naming(origin):
        pieces = _parted(name, storage.flatten(whole), group)
        if len(pieces) < len(group):
            raise CheckpointError(f"{origin}: {name} is quantized in a kind that cannot be parted as diffusers has it")
        written = storage.Written(descriptions={}, recipe=None, torchao=storage.torchao_version())
        return {piece: storage.restore(piece, one.parts, written, one.description) for piece, one in pieces.items()}


# ------------------------------------------------------------------------------------------------- to files


def flatten(
    tensors: Mapping[str, Tensor], config: TransformerConfig, recipe: str | None, origin: str
) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Any]]:
    """A model's tensors as they are stored.

    Args:
        tensors: by our names, of the shapes of that configuration.
        config: the model's.
        recipe: TOML, stored with them.
        origin: what is saved, for messages.

    Returns:
        Plain tensors, views of the given ones, what belongs together side by side; the metadata of each file; and what
        config.json says of them to diffusers. The latter two are empty where nothing is quantized.
    """
    groups = by_our_name(slots(config))
    if not any(is_quantized(tensor) for tensor in tensors.values()):
        return {slot.name: slot.view(tensors[name]) for name, group in groups.items() for slot in group}, {}, {}
    from quant import storage

    flat: dict[str, Tensor] = {}
    descriptions: dict[str, str] = {}
    names: list[str] = []
    with naming(origin):
        for name, group in groups.items():
            if not is_quantized(tensors[name]):
                names += [slot.name for slot in group]
                flat |= {slot.name: slot.view(tensors[name]) for slot in group}
                continue
            pieces = _parted(name, storage.flatten(tensors[name]), group)
            names += pieces
            descriptions |= {piece: one.description for piece, one in pieces.items()}
            for part in next(iter(pieces.values())).parts:
                flat |= {storage.part_name(piece, part): one.parts[part] for piece, one in pieces.items()}
        metadata = storage.pack(names, descriptions, recipe)
        about = storage.describe_for_diffusers([tensor for tensor in tensors.values() if is_quantized(tensor)])
    return flat, metadata, {"quantization_config": about}


def _parted(name: str, whole: Any, group: list[Slot]) -> dict[str, Any]:
    """A flattened tensor of ours as diffusers' several, where it can be parted."""
    if group[0].first_row is None:
        return {name: whole}
    parted = {slot.name: whole.rows(slot.first_row, slot.shape[0]) for slot in group}
    return {name: whole} if None in parted.values() else parted


__all__ = [
    "Found", "Quantized", "Weight", "check_alike", "check_same", "describe", "flatten", "inner_tensors", "is_quantized",
    "naming", "note_recipe", "parted", "recipe_text", "taken",
]  # fmt: skip
