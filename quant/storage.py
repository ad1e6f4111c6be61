"""Quantized weights as plain tensors and back: torchao's own flattened layout for ``.safetensors`` files, no pickle.

A quantized weight ``block.linear.weight`` is stored as its inner tensors ``block.linear._weight_qdata``,
``block.linear._weight_scale``, … and a line of JSON in the file's metadata under its own name, as
``torchao.prototype.safetensors`` writes them. Around that stand the version of torchao, the recipe, and a checksum of
all of it: one flipped bit in a block size would load and compute something else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quant.errors import QuantError

FORMAT = 1
"""Version of what stands around torchao's layout."""

_NAMES = "tensor_names"
_CHECKSUM = "quant.sha256"
_PLAIN = json.dumps({"_type": "Tensor"})
_ANY_ERROR = (ValueError, TypeError, AttributeError, LookupError, AssertionError, RuntimeError)
"""What constructors raise that are given another version's fields."""
_BY_ROWS = ("qdata", "scale", "zero_point")
"""Inner tensors that may have one entry, or row of them, for each row of the weight."""
_VALUES = {"Int8Tensor": (torch.int8,), "Float8Tensor": (torch.float8_e4m3fn, torch.float8_e5m2)}
"""Of weights whose ``qdata`` has their own shape: its dtypes."""


@dataclass(frozen=True, kw_only=True)
class Flat:
    """A quantized weight as plain tensors."""

    parts: dict[str, Tensor]
    """Its inner tensors, the weight's own memory, by the names that its class gives them."""
    description: str
    """JSON: its class and all that is no tensor."""

    def rows(self, first: int, count: int) -> Flat | None:
        """The same of some of its rows, without a copy; None where the format does not allow to part it by rows."""
        content = json.loads(self.description)
        qdata, block = self.parts["qdata"], content["_data"].get("block_size")
        if content["_type"] not in _VALUES or not block or qdata.dim() != 2 or block[0] not in (1, len(qdata)):
            return None
        if block[0] == len(qdata):
            content["_data"]["block_size"] = [count, *block[1:]]
        parts = {
            name: part[first : first + count] if name in _BY_ROWS and len(part) == len(qdata) else part
            for name, part in self.parts.items()
        }
        return Flat(parts=parts, description=json.dumps(content))


@dataclass(frozen=True, kw_only=True)
class Written:
    """What the metadata of a file say of its tensors."""

    descriptions: dict[str, str]
    """Of each quantized weight, by its name."""
    recipe: str | None
    """TOML of the recipe, where one was stored."""
    torchao: str | None
    """Version of torchao that wrote them, or None in files that were not written here."""

    def refuse(self, reason: object) -> QuantError:
        """The error to raise about weights that cannot be restored; it names both versions of torchao."""
        here = torchao_version()
        if self.torchao == here:
            return QuantError(
                f"written and read by torchao {here}, but {reason}: the file is damaged, restore it or quantize the "
                "original checkpoint again"
            )
        return QuantError(
            f"written by torchao {self.torchao or '(version not stored)'}, which the installed torchao {here} cannot "
            f"read ({reason}): install the version that wrote it, or quantize the original checkpoint again"
        )


def torchao_version() -> str:
    """Version of the installed torchao."""
    import torchao

    return str(torchao.__version__)


def is_quantized(tensor: Tensor) -> bool:
    """Whether a tensor is one of torchao's quantized ones, or derives from one."""
    return hasattr(tensor, "tensor_data_names") and any(
        kind.__module__.startswith("torchao.") for kind in type(tensor).__mro__
    )


def inner_tensors(weight: Tensor) -> dict[str, Tensor]:
    """The plain tensors that a quantized weight is made of, its own memory, by the names that its class gives them."""
    kind: Any = type(weight)
    names = [*kind.tensor_data_names, *getattr(kind, "optional_tensor_data_names", [])]
    parts = {name: getattr(weight, name) for name in names}
    return {name: part.detach() for name, part in parts.items() if part is not None}


def flatten(weight: Tensor) -> Flat:
    """A quantized weight as plain tensors, without a copy.

    Raises:
        QuantError: torchao has no file format for that kind of weight.
    """
    from torchao.prototype.safetensors.safetensors_utils import (
        ALLOWED_TENSORS_SUBCLASSES,
        TensorSubclassAttributeJSONEncoder,
    )

    kind = type(weight)
    if kind.__name__ not in ALLOWED_TENSORS_SUBCLASSES:
        raise QuantError(
            f"a weight is a {kind.__name__}, for which torchao {torchao_version()} has no safetensors format (it has "
            f"for {', '.join(ALLOWED_TENSORS_SUBCLASSES)}): use another scheme, or save the model before quantizing it"
        )
    description = json.dumps(weight, cls=TensorSubclassAttributeJSONEncoder)
    return Flat(parts=inner_tensors(weight), description=description)


def part_name(weight: str, part: str) -> str:
    """Under which name an inner tensor of a weight is stored."""
    module, _, leaf = weight.rpartition(".")
    return f"{module}._{leaf}_{part}"


def part_names(weight: str, description: str) -> dict[str, str]:
    """Under which names the inner tensors of a described weight are stored, by the names that its class gives them."""
    return {part: part_name(weight, part) for part in json.loads(description)["_tensor_data_names"]}


def join(descriptions: Sequence[str], rows: Sequence[int]) -> str:
    """The description of a weight whose rows, from the first on, are those of several.

    Args:
        descriptions: of the several.
        rows: how many rows each of them has.

    Raises:
        QuantError: they are not quantized in one way.
    """
    contents = [json.loads(description) for description in descriptions]
    whole = [content["_data"].get("block_size", [1])[:1] for content in contents]
    if all(first == [count] for first, count in zip(whole, rows, strict=True)) and max(rows) > 1:
        for content in contents:
            content["_data"]["block_size"][0] = sum(rows)
    if any(content != contents[0] for content in contents):
        raise QuantError("what is one weight here is quantized in several ways")
    if contents[0]["_type"] not in _VALUES:
        raise QuantError(f"a {contents[0]['_type']} cannot be put together from parts")
    return json.dumps(contents[0])


def is_by_rows(part: str, shape: Sequence[int], rows: int) -> bool:
    """Whether an inner tensor of a weight with so many rows has entries for each of them (else it is for them all)."""
    return part in _BY_ROWS and len(shape) == 2 and shape[0] == rows


def restore(name: str, parts: Mapping[str, Tensor], written: Written, description: str) -> Tensor:
    """The quantized weight on inner tensors, which it keeps as they are, on any device, meta too.

    Args:
        name: the weight's, for messages.
        parts: inner tensors by the names that its class gives them.
        written: what the file's metadata say.
        description: the weight's.

    Raises:
        QuantError: the installed torchao cannot make it, or makes something else of it.
    """
    from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict
    from torchao.prototype.safetensors.safetensors_utils import TensorSubclassAttributeJSONEncoder

    flat = {part_name(name, part): tensor for part, tensor in parts.items()}
    try:
        restored, left = unflatten_tensor_state_dict(flat, {name: description, _NAMES: json.dumps([name])})
        weight = restored[name]
        again = json.loads(json.dumps(weight, cls=TensorSubclassAttributeJSONEncoder))
        changed = _difference(json.loads(description), again)
        odd = _odd_parts(weight, parts)
    except _ANY_ERROR as error:
        raise written.refuse(f"{name}: {type(error).__name__}: {str(error)[:300]}") from None
    if left or changed or odd:
        raise written.refuse(f"{name}: {odd or changed or f'{sorted(left)} are left over'}")
    return weight


def _difference(stored: Any, restored: Any, path: str = "") -> str:
    """Where a description is not the restored weight's own. Fields that were added since have their defaults."""
    if isinstance(stored, dict) and isinstance(restored, dict):
        if absent := [key for key in stored if key not in restored]:
            return f"{path}{absent[0]} is not known"
        return next(filter(None, (_difference(stored[key], restored[key], f"{path}{key}.") for key in stored)), "")
    if path.startswith("_tensor_data_names"):
        stored, restored = sorted(stored), sorted(restored)
    return "" if stored == restored else f"{path.rstrip('.')} is {stored!r}, restored as {restored!r}"


def _odd_parts(weight: Any, parts: Mapping[str, Tensor]) -> str:
    """What of inner tensors does not fit the weight they make up."""
    dtypes = _VALUES.get(type(weight).__name__)
    if dtypes is None:
        return ""
    qdata, block = parts["qdata"], weight.block_size
    if qdata.dtype not in dtypes or not weight.dtype.is_floating_point:
        return f"its values are {qdata.dtype} for {weight.dtype}"
    fits = len(block) == qdata.dim() and all(
        isinstance(size, int) and size > 0 and dim % size == 0 for dim, size in zip(qdata.shape, block, strict=True)
    )
    if not fits:
        return f"its blocks {block} do not divide {tuple(qdata.shape)}"
    expected = tuple(dim // size for dim, size in zip(qdata.shape, block, strict=True))
    for part in ("scale", "zero_point"):
        if part in parts and tuple(parts[part].shape) != expected:
            return f"its {part} has shape {tuple(parts[part].shape)} in place of {expected}"
    return "" if parts["scale"].is_floating_point() else f"its scale is {parts['scale'].dtype}"


def pack(names: Sequence[str], descriptions: Mapping[str, str], recipe: str | None) -> dict[str, str]:
    """The metadata of a file, the same for all shards of a checkpoint.

    Args:
        names: of all weights, quantized or not.
        descriptions: of the quantized ones, by name.
        recipe: its TOML, kept for the reader.
    """
    entries = {name: descriptions.get(name, _PLAIN) for name in names} | {_NAMES: json.dumps(list(names))}
    entries |= {"quant.format": str(FORMAT), "quant.torchao": torchao_version()}
    if recipe is not None:
        entries["quant.recipe"] = recipe
    return entries | {_CHECKSUM: _checksum(entries)}


def unpack(metadata: Mapping[str, str]) -> Written | None:
    """What a file's metadata say, or None where they are not torchao's.

    Files that diffusers wrote, which have no version, recipe and checksum, are taken as well.

    Raises:
        QuantError: the metadata are damaged, or of a newer format.
    """
    entries = {key: value for key, value in metadata.items() if key != _CHECKSUM}
    if _CHECKSUM in metadata and metadata[_CHECKSUM] != _checksum({k: v for k, v in entries.items() if k != "format"}):
        raise QuantError("the description of its quantized weights is damaged (its checksum differs): restore the file")
    if _NAMES not in entries:
        return None
    version = entries.get("quant.format", str(FORMAT))
    torchao = entries.get("quant.torchao")
    if version != str(FORMAT):
        raise QuantError(
            f"stored in format {version} by torchao {torchao}, but format {FORMAT} is what can be read here (with "
            f"torchao {torchao_version()}): use a newer version of this package, or quantize the original again"
        )
    try:
        contents = {name: json.loads(entries[name]) for name in json.loads(entries[_NAMES])}
        descriptions = {
            name: entries[name]
            for name, content in contents.items()
            if content["_type"] != "Tensor" and isinstance(content["_data"], dict) and content["_tensor_data_names"]
        }
        for name in descriptions:
            ".".join(contents[name]["_tensor_data_names"])  # texts
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise QuantError(
            f"the description of its quantized weights cannot be read ({type(error).__name__}: {error}): restore the "
            "file"
        ) from None
    return Written(descriptions=descriptions, recipe=entries.get("quant.recipe"), torchao=torchao)


def describe_for_diffusers(weights: Sequence[Tensor]) -> dict[str, Any]:
    """What diffusers calls ``quantization_config``, with which it restores the files itself.

    It names one torchao config for a whole model, the most frequent one here; what each weight is stands in the file.
    """
    from torchao.core.config import config_to_dict

    kinds = [_config_of(weight) for weight in weights]
    names = [type(kind).__name__ for kind in kinds]
    chosen = kinds[names.index(max(names, key=names.count))]
    return {"quant_method": "torchao", "quant_type": {"default": config_to_dict(chosen)}}


def _config_of(weight: Any) -> Any:
    """A torchao config that makes weights of that kind."""
    from torchao import quantization

    dynamic = getattr(weight, "act_quant_kwargs", None) is not None
    kind = type(weight).__name__
    if kind == "Float8Tensor" and dynamic:
        return quantization.Float8DynamicActivationFloat8WeightConfig(
            granularity=weight.act_quant_kwargs.granularity, set_inductor_config=False
        )
    if kind == "Float8Tensor":
        return quantization.Float8WeightOnlyConfig(set_inductor_config=False)
    if kind == "Int8Tensor" and dynamic:
        return quantization.Int8DynamicActivationInt8WeightConfig(
            granularity=weight.act_quant_kwargs.granularity, set_inductor_config=False
        )
    if kind == "Int8Tensor":
        return quantization.Int8WeightOnlyConfig(set_inductor_config=False)
    if kind.startswith("Intx"):
        return quantization.IntxWeightOnlyConfig()
    return quantization.Int4WeightOnlyConfig(set_inductor_config=False)


def _checksum(entries: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(dict(sorted(entries.items()))).encode()).hexdigest()


__all__ = [
    "FORMAT", "Flat", "Written", "describe_for_diffusers", "flatten", "inner_tensors", "is_by_rows", "is_quantized",
    "join", "pack", "part_name", "part_names", "restore", "torchao_version", "unpack",
]  # fmt: skip
