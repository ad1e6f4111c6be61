"""LoRAs in a model's weights: merged as the weights come, and exchanged later in place, with an exact way back.

What a weight becomes is always computed anew from the weight without LoRAs, summed in fp32 and rounded once, and
quantized as it was when it was loaded: so switching gives the very bits that loading would, and no error adds up.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cogx_fast.config import TransformerConfig
from cogx_fast.model.transformer import CogVideoXTransformer
from cogx_fast.weights.assemble import Store, put
from cogx_fast.weights.checkpoint import FileStore
from cogx_fast.weights.checks import check_tensors
from cogx_fast.weights.errors import some
from cogx_fast.weights.layout import Slot, by_our_name, slots
from cogx_fast.weights.lora import Delta, Deltas, LoraError, LoraLike, as_loras, read_loras
from cogx_fast.weights.quantized import inner_tensors, is_quantized
from cogx_fast.weights.sources import resolve

_COMPARED = ("patch_embed.text_proj.bias", "proj_out.bias", "norm_out.linear.bias")
"""No LoRA changes them and nothing quantizes them: by them it is seen whether files are those a model was made of."""


_ROWS_AT_ONCE = 256
"""Of a weight on a CPU, in fp32: some 3 MB of 5b's, which stay in its cache."""


class Merge:
    """Merges LoRAs as weights come (``assemble.Transform``).

    Args:
        loras: files, with their weights; none of them is read yet.

    Raises:
        LoraError: (a ValueError) something among them is no LoRA.
    """

    def __init__(self, loras: Sequence[LoraLike]) -> None:
        self.loras = as_loras(loras)
        self.merged: Merged | None = None
        self._touched: dict[str, list[Slot]] = {}

    def check(self, model: CogVideoXTransformer, store: Store) -> None:
        """Read the files and check them against the model that is made.

        Raises:
            LoraError: (a ValueError) one is damaged, or for another model, or holds what cannot be merged; or the
                weights are quantized already.
            FileNotFoundError: it is not there.
        """
        if store.quantized:
            raise LoraError(
                f"{store.origin}: LoRAs cannot be merged into weights that are quantized already "
                f"({some(store.quantized, 2)}): give the original weights, loras=... and quant=... together"
            )
        self.merged = Merged(store.config, store)
        self.merged.deltas = read_loras(self.loras, store.config)
        self._touched = self.merged.touched(self.merged.deltas)

    def apply(self, part: nn.Module, name: str) -> None:
        """Merge into a part of the model whose weights are there; they are replaced."""
        assert self.merged is not None, "check comes first"
        for our_name, group in self._touched.items():
            if not our_name.startswith(f"{name}."):
                continue
            inside = our_name.removeprefix(f"{name}.")
            path, _, leaf = inside.rpartition(".")
            old: Any = part.get_submodule(path)._parameters[leaf]
            self.merged.keep(our_name, old)
            put(part, inside, merge(old, group, self.merged.deltas), requires_grad=old.requires_grad)


class Merged:
    """The LoRAs that a model's weights hold, and where the weights without them are.

    Args:
        config: the model's.
        store: what the model was made of. Files are read again when LoRAs change; of a live model the weights that
            LoRAs touch are kept in main memory.
    """

    def __init__(self, config: TransformerConfig, store: Store | None = None) -> None:
        self.deltas: Deltas = {}
        self.config = config
        self._files = store if isinstance(store, FileStore) else None
        self._kept: dict[str, Tensor] = {}
        self._versions: dict[str, int] = {}
        self._trained: set[str] = set()

    def keep(self, name: str, weight: Tensor) -> None:
        """Keep a weight of our name as it is without LoRAs, unless it can be read again."""
        if self._files is None and name not in self._kept:
            self._kept[name] = weight.detach().to("cpu", copy=True)

    def look(self, model: nn.Module) -> None:
        """Look which weights were changed since ``note``, by training or ``load_state_dict``."""
        found = model.named_parameters()
        self._trained |= {name for name, each in found if self._versions.get(name, each._version) != each._version}

    def note(self, model: nn.Module) -> None:
        """Take the weights as they are now for what loading, moving or exchanging made of them."""
        self._versions = {name: parameter._version for name, parameter in model.named_parameters()}

    def touched(self, *several: Deltas) -> dict[str, list[Slot]]:
        """Our tensors that any of these LoRAs are for, and what each is made of."""
        groups = by_our_name(slots(self.config))
        return {
            name: group
            for name, group in groups.items()
            if any(slot.name in each for slot in group for each in several)
        }

    def exchange(self, model: nn.Module, wanted: Deltas) -> None:
        """Have the model's weights hold these LoRAs and no others: in place, in the same memory.

        Args:
            model: that this belongs to. Compiled code and packages that read its weights go on.
            wanted: checked against its configuration already.

        Raises:
            LoraError: (a ValueError) the weights without LoRAs cannot be restored, or the model was trained since.
                Nothing is changed then.
        """
        changed = {
            name: group
            for name, group in self.touched(self.deltas, wanted).items()
            if any(not _same(self.deltas.get(slot.name, []), wanted.get(slot.name, [])) for slot in group)
        }
        parameters = dict(model.named_parameters())
        self._check(model, {name: parameters[name] for name in changed})
        quantized = [name for name in changed if is_quantized(parameters[name])]
        requantize = _requantizer(model) if quantized else None
        for name, group in changed.items():
            parameter, base = parameters[name], self._base(name, group, parameters[name])
            with torch.no_grad():
                if requantize is None or name not in quantized:
                    parameter.copy_(base)
                    _add(parameter, group, wanted)
                    continue
                whole = merge(base, group, wanted)
                for old, new in zip(inner_tensors(parameter), inner_tensors(requantize(name, whole)), strict=True):
                    old.copy_(new)
        self.deltas = wanted
        self.note(model)

    def _check(self, model: nn.Module, changed: Mapping[str, Tensor]) -> None:
        self.look(model)
        apart = {name: [name.replace(".to_qkv.", f".{each}.") for each in ("to_q", "to_k", "to_v")] for name in changed}
        trained = [name for name in changed if self._trained & {name, *apart[name]}]
        if trained:
            raise LoraError(
                f"{some(trained, 2)} were changed since the model was loaded (by training, or load_state_dict), so the "
                "weights without LoRAs are not known: save the model, and load it with loras=..."
            )
        if self._files is not None and not self._files.is_unchanged:
            raise LoraError(
                f"{self._files.origin}: was changed or removed since the model was loaded from it, so the weights "
                "without LoRAs cannot be restored: load the model anew"
            )
        lost = [name for name, each in changed.items() if is_quantized(each) and name not in self._kept]
        if lost and self._files is None:
            self._files = _files_of(model)
        if lost and self._files is None:
            raise LoraError(
                f"{some(lost, 2)} are quantized, and the weights that they were made of are gone: load the model from "
                "its files (cogx_fast.load(path, quant=...)), or give loras=... together with quant=..."
            )
        for name, each in changed.items():
            self.keep(name, each)

    def _base(self, name: str, group: list[Slot], parameter: Tensor) -> Tensor:
        if name in self._kept:
            return self._kept[name].to(parameter.device, parameter.dtype)
        assert self._files is not None
        return self._files.read({name: group}, {name: parameter.dtype}, parameter.device, stay=True)[name][0]


def merge(base: Tensor, group: list[Slot], deltas: Deltas) -> Tensor:
    """A copy of one of our weights with what LoRAs add to it: summed in fp32 and rounded once."""
    whole = base.detach().clone()
    _add(whole, group, deltas)
    return whole


@torch.no_grad()
def _add(whole: Tensor, group: list[Slot], deltas: Deltas) -> None:
    """Add what LoRAs add to one of our weights, in place."""
    for slot in group:
        if slot.name not in deltas:
            continue
        rows = slot.view(whole)
        loras = [_fp32(each, whole.device) for each in deltas[slot.name]]
        at_once = _ROWS_AT_ONCE if whole.device.type == "cpu" else len(rows)
        for first in range(0, len(rows), at_once):
            some_rows = rows[first : first + at_once]
            total = _sum(some_rows.float().flatten(1), loras, slice(first, first + at_once))
            some_rows.copy_(total.view(some_rows.shape))


def _sum(total: Tensor, loras: Sequence[Delta], rows: slice) -> Tensor:
    """Some rows of a weight with LoRAs one after the other (``Delta`` says how), in the memory of ``total``."""
    needs_base = any(each.magnitude is not None for each in loras)
    stage, base = -1, total
    for each in loras:
        if needs_base and each.stage != stage:
            stage, base = each.stage, total.clone()
        up = each.up[rows]
        total.addmm_(up, each.down, alpha=each.scale)
        if each.magnitude is not None:
            norms = torch.addmm(base, up, each.down, alpha=each.scale).norm(dim=1, keepdim=True)
            # A row of zeros has no direction, and stays one.
            total *= each.magnitude[rows, None] / norms.masked_fill_(norms == 0, 1)
    return total


def _fp32(lora: Delta, device: torch.device) -> Delta:
    moved: dict[str, Any] = {name: each.to(device, torch.float32) for name, each in lora.tensors.items()}
    return replace(lora, **moved)


def _same(before: Sequence[Delta], after: Sequence[Delta]) -> bool:
    return len(before) == len(after) and all(map(_equal, before, after))


def _equal(one: Delta, other: Delta) -> bool:
    return (
        (one.scale, one.stage, one.tensors.keys()) == (other.scale, other.stage, other.tensors.keys())
        and all(torch.equal(each, other.tensors[name]) for name, each in one.tensors.items())
    )  # fmt: skip


def _requantizer(model: nn.Module) -> Callable[[str, Tensor], Tensor]:
    """Quantizes a weight of the model as its recipe has it.

    Raises:
        LoraError: it has none.
    """
    from quant.apply import plan, recipe_of

    recipe = recipe_of(model)
    if recipe is None:
        raise LoraError("the model was quantized without a recipe: load it anew with loras=... and quant=...")
    linears = [(name, each) for name, each in model.named_modules() if isinstance(each, nn.Linear)]
    planned = plan([(name, (each.out_features, each.in_features)) for name, each in linears], recipe)

    def requantize(name: str, weight: Tensor) -> Tensor:
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        planned.apply(linear, name.removesuffix(".weight"), measure=False)
        return linear.weight.data

    return requantize


def _files_of(model: Any) -> FileStore | None:
    """The files on this machine that a live model's weights were loaded from, if they still are what they were."""
    path = model.config.get("_name_or_path")
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        return None
    try:
        store = FileStore(resolve(path, local_files_only=True))
        check_tensors(store.found, model.config, store.origin)
    except (ValueError, OSError):
        return None
    groups = {name: group for name, group in by_our_name(slots(model.config)).items() if name in _COMPARED}
    parameters = dict(model.named_parameters())
    dtypes = {name: parameters[name].dtype for name in groups}
    read = store.read(groups, dtypes, torch.device("cpu"), stay=True)
    same = all(torch.equal(tensor, parameters[name].detach().cpu()) for name, (tensor, _) in read.items())
    return store if same and not store.quantized else None


__all__ = ["Merge", "Merged", "merge"]
