"""A model's weights in diffusers' layout and names, written so that a kill at any moment leaves a whole checkpoint.

New files are written beside the old ones under hidden names, synced, and then put in place in an order in which every
step leaves the directory readable as the old checkpoint or as the new one: what readers go by (the index where there is
one, else the single file) changes in one rename. Only the configuration is a file of its own; where it changes too,
the instant between its rename and that of the weights is the one in which they disagree, which loading reports. (Where
only whether the weights are quantized changes, there is no such instant: they know that themselves, and for diffusers
the configuration is replaced first where they will be, last where they were.)
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from cogx_fast.model.transformer import CogVideoXTransformer
from cogx_fast.weights.errors import CheckpointError
from cogx_fast.weights.live import check_ours, model_config, plain_tensors
from cogx_fast.weights.quantized import flatten, recipe_text
from cogx_fast.weights.sources import (
    CONFIG_NAME,
    PICKLED,
    SAFE,
    STEM,
    index_name,
    read_index,
    recipe_name,
    shard_name,
    weights_name,
)
from cogx_fast.weights.state import in_upstream_names
from cogx_fast.weights.writing import sync_directory, write_json, write_pickled, write_tensors, write_text

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_HIDDEN = ".cogx-fast-save-"
"""Begins the name of every file that is not yet in place; what a killed save left is removed by the next one."""
RECIPE_HEADER = "# The recipe that the weights beside it were quantized with. What is read is their own copy of it.\n\n"


def save_checkpoint(
    model: CogVideoXTransformer,
    directory: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "10GB",
    variant: str | None = None,
    pickled: bool = False,
) -> None:
    """Write a model's configuration and weights as diffusers' ``save_pretrained`` would.

    Names, shapes, dtypes and values are those of diffusers' model, bit for bit. Within a file, tensors that are one in
    this package's model stand next to each other (their order is free in the format), so that ``load`` can map them.
    Quantized weights are written in torchao's flattened layout, which diffusers' quantizer for torchao reads
    (``weights.quantized``), with the recipe in every file and, for people, in a ``recipe.toml``.

    Args:
        model: with the weights it was loaded with or trained to, quantized or not; not baked or adapted.
        directory: made if it is not there. An earlier save of the same variant is replaced, other files are left.
        max_shard_size: bytes in a file, a number or e.g. "5GB"; more go to further files, with an index.
        variant: the ``<variant>`` in ``diffusion_pytorch_model.<variant>.safetensors``.
        pickled: write ``.bin`` files of ``torch.save``, which are not read here; an earlier save of the variant in
            the other format is removed, for readers go by that one.

    Raises:
        CheckpointError: the model's weights are not those of its configuration, or an argument cannot be.
        OSError: the directory cannot be written; what was there is unchanged.
    """
    target = Path(directory)
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target}: is a file: give a directory")
    if variant is not None and not re.fullmatch(r"[\w-][\w.-]*", variant):
        raise CheckpointError(f"variant is {variant!r}, expected letters, digits, '_', '-' or '.', or None")
    origin = f"the {type(model).__name__} to save"
    config = model_config(model)
    ours = plain_tensors(model, origin)
    check_ours(ours, config, origin)
    recipe = recipe_text(model)
    tensors, metadata, about = flatten({name: t.detach() for name, t in ours.items()}, config, recipe, origin)
    if pickled:
        tensors = in_upstream_names({name: tensor.detach() for name, tensor in ours.items()}, config, origin)
    shards = _split(tensors, _bytes(max_shard_size))
    target.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target)
    saving = _Saving(target, variant, len(shards), PICKLED if pickled else SAFE)
    try:
        write_json(saving.hidden(CONFIG_NAME), config.to_dict() | about)
        if recipe is not None:
            write_text(saving.hidden(saving.recipe), RECIPE_HEADER + recipe)
        for name, shard in zip(saving.names, shards, strict=True):
            chosen = {key: tensors[key] for key in shard}
            if pickled:
                write_pickled(saving.hidden(name), chosen)
            else:
                write_tensors(saving.hidden(name), chosen, metadata)
        sync_directory(target)
    except BaseException:
        saving.forget()
        raise
    saving.put_in_place(shards, sum(tensor.nbytes for tensor in tensors.values()), quantized=bool(about))


class _Saving:
    """One save: where its files are before, and how they come into place."""

    def __init__(self, directory: Path, variant: str | None, count: int, suffix: str) -> None:
        self.directory = directory
        self.suffix = suffix
        self.index = directory / index_name(variant, suffix)
        self.recipe = recipe_name(variant)
        self.variant = variant
        self.names = (
            [weights_name(variant, suffix)]
            if count == 1
            else [shard_name(variant, number, count, suffix) for number in range(1, count + 1)]
        )
        self._token = secrets.token_hex(4)

    def hidden(self, name: str) -> Path:
        return self.directory / f"{_HIDDEN}{self._token}-{name}"

    def forget(self) -> None:
        for path in self.directory.glob(f"{_HIDDEN}{self._token}-*"):
            path.unlink(missing_ok=True)

    def put_in_place(self, shards: list[list[str]], total_bytes: int, *, quantized: bool) -> None:
        """From both checkpoints on disk, the old one in force, to the new one alone."""
        if quantized:  # a configuration that says so is no harm to plain weights; the other way round it is
            os.replace(self.hidden(CONFIG_NAME), self.directory / CONFIG_NAME)
            sync_directory(self.directory)
        if len(self.names) == 1:
            os.replace(self.hidden(self.names[0]), self.directory / self.names[0])
            self.index.unlink(missing_ok=True)  # readers go by an index where there is one: the change, if there was
        elif not any((self.directory / name).exists() for name in self.names):
            for name in self.names:
                os.replace(self.hidden(name), self.directory / name)
            self._write_index(shards, self.names, total_bytes)
        else:
            self._replace_shards(shards, total_bytes)
        if not quantized:
            os.replace(self.hidden(CONFIG_NAME), self.directory / CONFIG_NAME)
        if self.hidden(self.recipe).exists():
            os.replace(self.hidden(self.recipe), self.directory / self.recipe)
        elif _is_ours(self.directory / self.recipe):
            (self.directory / self.recipe).unlink()
        sync_directory(self.directory)
        for path in self._stale():
            path.unlink(missing_ok=True)
        _remove_leftovers(self.directory)

    def _replace_shards(self, shards: list[list[str]], total_bytes: int) -> None:
        """New shards over old ones of the same names, of which the index in force must never see a mixture."""
        self._write_index(shards, [self.hidden(name).name for name in self.names], total_bytes)
        for name in self.names:
            (self.directory / name).unlink(missing_ok=True)
            try:
                os.link(self.hidden(name), self.directory / name)
            except OSError:  # a file system without links
                shutil.copyfile(self.hidden(name), self.directory / name)
        self._write_index(shards, self.names, total_bytes)

    def _write_index(self, shards: list[list[str]], files: Iterable[str], total_bytes: int) -> None:
        weight_map = {key: file for file, keys in zip(files, shards, strict=True) for key in keys}
        write_json(
            self.hidden(self.index.name),
            {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))},
        )
        sync_directory(self.directory)
        os.replace(self.hidden(self.index.name), self.index)
        sync_directory(self.directory)

    def _stale(self) -> list[Path]:
        """Weights of this variant that earlier saves left."""
        stem = re.escape(weights_name(self.variant, ""))
        suffixes = {re.escape(each) for each in (self.suffix, SAFE)}  # which readers take before any other
        weights = re.compile(rf"{stem}(-\d{{5}}-of-\d{{5}})?({'|'.join(suffixes)})")
        stale = [
            path for path in self.directory.iterdir() if weights.fullmatch(path.name) and path.name not in self.names
        ]
        return stale if self.suffix == SAFE else [self.directory / index_name(self.variant), *stale]


def _is_ours(recipe: Path) -> bool:
    """Whether a recipe's file was written by a save, and not by the user."""
    try:
        with recipe.open("rb") as file:
            return file.read(len(RECIPE_HEADER)) == RECIPE_HEADER.encode()
    except OSError:
        return False


def _remove_leftovers(directory: Path) -> None:
    """Remove what a killed save left, unless an index goes by it (a save that was killed on its last steps)."""
    in_force: set[str] = set()
    for index in directory.glob(f"{STEM}*.index*.json"):
        with contextlib.suppress(CheckpointError):  # a damaged index holds nothing together, and may be replaced
            in_force |= set(read_index(index, PICKLED if f"{PICKLED}.index" in index.name else SAFE).values())
    for path in directory.glob(f"{_HIDDEN}*"):
        if path.name not in in_force:
            path.unlink(missing_ok=True)


def _split(tensors: Mapping[str, Tensor], most: int) -> list[list[str]]:
    """Names by shard: wider dtypes first, which keeps every tensor aligned, else in the order given."""
    shards: list[list[str]] = []
    size = math.inf
    for name in sorted(tensors, key=lambda name: -tensors[name].element_size()):
        if size + tensors[name].nbytes > most:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensors[name].nbytes
    return shards


def _bytes(size: int | str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B?)\s*", str(size), re.IGNORECASE)
    count = float(match[1]) * _UNITS.get(match[2].upper(), 0) if match else 0
    if count < 1:
        raise CheckpointError(f"max_shard_size is {size!r}, expected a number of bytes above 0 or a size such as '5GB'")
    return int(count)


__all__ = ["save_checkpoint"]
