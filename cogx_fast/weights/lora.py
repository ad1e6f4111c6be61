"""LoRA files as they are found in the wild, read by what is in them, and merged into a model's weights.

| writer | names | alpha |
|---|---|---|
| diffusers, PEFT, trainers | ``transformer.….lora_A.weight``, with or without the prefix | metadata, or none |
| SAT (the original code) | ``….layers.0.attention.query_key_value.matrix_A.0`` | 1 |
| VideoX-Fun, kohya's | ``lora_unet__transformer_blocks_0_attn1_to_q.lora_down.weight`` | a tensor, or none |

PEFT's rsLoRA (alpha / √rank in place of alpha / rank) and DoRA (a magnitude for each row of the sum) are merged as PEFT
does. Every tensor finds its place or is refused by name; nothing of a model is touched before all files are checked.
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from cogx_fast.config import TransformerConfig
from cogx_fast.weights.errors import CheckpointError, some
from cogx_fast.weights.layout import Slot, slots

_PREFIXES = ("base_model.model.", "transformer.", "diffusion_model.", "model.", "module.")
_HALF = re.compile(
    r"(?P<module>.+?)\.(?:lora_(?P<half>A|B|down|up)|lora\.(?P<old>down|up))(?:\.(?!weight$)[^.]+)?\.weight"
)
_SAT = re.compile(
    r"(?:.*\.)?layers\.(?P<layer>\d+)\.attention\.(?P<module>query_key_value|dense)\.matrix_(?P<half>[AB])\.(?P<index>\d+)"
)
_MAGNITUDE = re.compile(r"(?P<module>.+?)\.lora_magnitude_vector(?:\.[^.]+){0,2}")
_KOHYA = re.compile(r"lora_(?:unet|transformer)_+(?P<module>.+)")
_FUSE = "load it with diffusers and fuse it there"
_NOT_CARRIED_OUT = (
    (
        re.compile(r"\.dora_scale$"),
        "of LyCORIS' DoRA, whose versions divide by means or norms, of columns or rows, and files do not say by which",
        "merge it with the version that trained it, and load the merged weights",
    ),
    (re.compile(r"^lora_te\d*_|^text_encoder"), "for the text encoder, which this package does not touch", _FUSE),
    (re.compile(r"\.lora_[AB](\.[^.]+)?\.bias$|\.diff(_b)?$"), "with biases or whole differences", _FUSE),
    (re.compile(r"\.hada_|\.lokr_|\.oft_|\.lora_mid"), "LoHa, LoKr or OFT", _FUSE),
)


class LoraError(CheckpointError):
    """A LoRA file that cannot be merged into a model; the message names what, and says what to do."""


@dataclass(frozen=True)
class Lora:
    """A file, and how strongly it is merged."""

    path: str | os.PathLike[str]
    """A ``.safetensors`` file."""
    weight: float = 1.0
    """What the whole of it is multiplied by."""
    alpha: float | None = None
    """In place of what the file says: its scale is ``alpha / rank`` (rsLoRA: ``alpha / √rank``)."""


LoraLike = Lora | str | os.PathLike[str] | tuple[str | os.PathLike[str], float]


@dataclass
class _Pair:
    """The two halves for one linear."""

    down: Tensor | None = None
    """``(rank, in)``."""
    up: Tensor | None = None
    """``(out, rank)``."""
    alpha: float | None = None
    magnitude: Tensor | None = None
    """``(out,)``, of DoRA."""


@dataclass(frozen=True)
class Delta:
    """What is added to one of diffusers' weights: ``scale · up · down``."""

    down: Tensor
    up: Tensor
    scale: float
    magnitude: Tensor | None = None
    """``(out,)``, of DoRA: the sum's rows are then multiplied by ``magnitude / ‖base + scale · up · down‖``."""
    stage: int = 0
    """That ``base`` is the weight as earlier stages left it. Within a stage one follows the other, each with its norms
    of the same base, as PEFT merges them."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Those that it has, by field."""
        found = {"down": self.down, "up": self.up, "magnitude": self.magnitude}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


@dataclass(frozen=True, kw_only=True)
class Said:
    """What is known of a LoRA beside its tensors, as PEFT's configuration has it."""

    alpha: float | None = None
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Other alphas, by a pattern that ends the linear's name."""
    use_rslora: bool = False
    use_dora: bool = False

    def alpha_of(self, name: str) -> float | None:
        """A linear's alpha, or None where nothing is said."""
        found = (each for pattern, each in self.alpha_pattern.items() if re.fullmatch(rf"(.*\.)?({pattern})", name))
        return next(found, self.alpha)


Deltas = dict[str, list[Delta]]
"""What is added to each of diffusers' weights, by its name, in the order in which it is."""


def read_loras(loras: Sequence[LoraLike], config: TransformerConfig) -> Deltas:
    """Read LoRA files and check them against a configuration.

    Args:
        loras: each a path, ``(path, weight)`` or a ``Lora``.
        config: of the model that they are for.

    Raises:
        LoraError: (a ValueError) one is damaged, or for another model, or holds what cannot be merged.
        FileNotFoundError: it is not there.
    """
    linears = linear_slots(config)
    found: Deltas = {}
    for lora in as_loras(loras):
        for name, delta in _read(lora, linears).items():
            found.setdefault(f"{name}.weight", []).append(delta)
    return found


def linear_slots(config: TransformerConfig) -> dict[str, Slot]:
    """The weights that LoRAs can be for, by diffusers' name of the module."""
    names = ((name, slot) for name, slot in slots(config).items() if name.endswith(".weight") and len(slot.shape) > 1)
    return {name.removesuffix(".weight"): slot for name, slot in names}


def as_loras(loras: Sequence[LoraLike]) -> list[Lora]:
    """What ``loras=`` is given, as a list of ``Lora``.

    Raises:
        LoraError: something in it is none.
    """
    if isinstance(loras, str | os.PathLike):
        raise LoraError(f"loras is {loras!r}, expected a list: loras=[{loras!r}]")
    return [as_lora(each) for each in loras]


def as_lora(value: LoraLike) -> Lora:
    """A ``Lora`` from itself, a path, or a path and a weight.

    Raises:
        LoraError: it is none.
    """
    if isinstance(value, tuple) and len(value) == 2:
        value = Lora(*value)
    elif isinstance(value, str | os.PathLike):
        value = Lora(value)
    if not isinstance(value, Lora) or not isinstance(value.path, str | os.PathLike):  # type: ignore[redundant-expr]
        raise LoraError(f"got {value!r} for a LoRA, expected a file, (file, weight), or a Lora")
    if isinstance(value.weight, bool) or not isinstance(value.weight, int | float):
        raise LoraError(f"{value.path}: its weight is {value.weight!r}, expected a number")
    return value


def _read(lora: Lora, linears: Mapping[str, Slot]) -> dict[str, Delta]:
    from safetensors import SafetensorError, safe_open

    path = Path(lora.path)
    if not path.is_file():
        raise FileNotFoundError(f"LoRA file {str(path)!r} is not there")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except (SafetensorError, OSError) as error:
        raise LoraError(
            f"{path}: cannot be read as a .safetensors file ({error}): download it again; pickled ones (.bin, .pt) are "
            "not read, since reading them can run any code"
        ) from None
    return deltas_of(tensors, linears, str(path), said=said_in(metadata, str(path)), lora=lora)


def deltas_of(
    tensors: Mapping[str, Tensor],
    linears: Mapping[str, Slot],
    origin: str,
    *,
    said: Said,
    lora: Lora,
) -> dict[str, Delta]:
    """What the tensors of a LoRA add to each linear.

    Args:
        tensors: both halves, magnitudes and alphas, under any of the writers' names.
        linears: ``linear_slots`` of the model.
        origin: what they are called in messages.
        said: what is known beside them.
        lora: its weight, and an alpha that goes before all others.

    Raises:
        LoraError: something in it finds no place, or cannot be merged.
    """
    pairs, is_sat = _pairs(tensors, linears, origin)
    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    bad = [name for name, tensor in floats.items() if not tensor.float().isfinite().all()]  # fp8 has no isfinite
    if bad:
        raise LoraError(f"{origin}: infinite or NaN values in {some(bad)}: download it again")
    found: dict[str, Delta] = {}
    assumed: set[int] = set()
    is_dora = said.use_dora or any(pair.magnitude is not None for pair in pairs.values())
    for name, pair in pairs.items():
        down, up = _halves(name, pair, linears[name], origin)
        magnitude = _magnitude(name, pair, len(up), origin) if is_dora else None
        rank = down.shape[0]
        alpha = lora.alpha if lora.alpha is not None else pair.alpha
        if alpha is None:
            alpha = 1.0 if is_sat else said.alpha_of(name)
        if alpha is None and said.use_rslora:
            raise LoraError(f"{origin}: says rsLoRA, but no alpha: give cogx_fast.Lora(path, weight, alpha=...)")
        if alpha is None:
            assumed.add(rank)
            alpha = float(rank)
        scale = lora.weight * alpha / (math.sqrt(rank) if said.use_rslora else rank)
        # Copied: they are mapped from a file, which a later training run may write over.
        found[name] = Delta(down.clone(), up.clone(), scale, None if magnitude is None else magnitude.clone())
    if assumed:
        ranks = ", ".join(map(str, sorted(assumed)))
        warnings.warn(
            f"{origin}: says no alpha; it is taken to be the rank ({ranks}), as diffusers takes it. Trainers that use "
            "another (CogKit and zai-org's: 64 at rank 128) need cogx_fast.Lora(path, weight, alpha=64)",
            stacklevel=2,
        )
    return found


def _pairs(tensors: Mapping[str, Tensor], linears: Mapping[str, Slot], path: str) -> tuple[dict[str, _Pair], bool]:
    """Both halves of each linear by diffusers' name, and whether they are in the original code's layout."""
    for pattern, what, remedy in _NOT_CARRIED_OUT:
        named = [name for name in tensors if pattern.search(name)]
        if named:
            raise LoraError(f"{path}: holds adapters {what} ({some(named, 2)}): {remedy}")
    by_flat_name = {name.replace(".", "_"): name for name in linears}
    pairs: dict[str, _Pair] = {}
    lost: list[str] = []
    is_sat = False
    for name, tensor in tensors.items():
        place = _place(name, linears, by_flat_name)
        if place is None:
            lost.append(name)
            continue
        module, half = place
        is_sat = is_sat or ".matrix_" in name
        pair = pairs.setdefault(module, _Pair())
        if half == "alpha":
            pair.alpha = float(tensor)
        elif half == "magnitude":
            pair.magnitude = tensor
        elif half == "down":
            pair.down = tensor
        else:
            pair.up = tensor
    if lost or not pairs:
        what = f"{len(lost)} of its {len(tensors)} tensors have no place in this model: {some(lost)}"
        raise LoraError(
            f"{path}: {what if lost else 'holds no tensors'}. Is it a LoRA of another model? Nothing of it is merged"
        )
    return pairs, is_sat


def _place(name: str, linears: Mapping[str, Slot], by_flat_name: Mapping[str, str]) -> tuple[str, str] | None:
    """The linear that a tensor is for, and what it is: "down", "up", "alpha" or "magnitude"."""
    if (sat := _SAT.fullmatch(name)) is not None:
        block, index = f"transformer_blocks.{sat['layer']}.attn1", int(sat["index"])
        names = ("to_q", "to_k", "to_v") if sat["module"] == "query_key_value" else ("to_out.0",)
        module = f"{block}.{names[index]}" if index < len(names) else ""
        return (module, "down" if sat["half"] == "A" else "up") if module in linears else None
    if name.endswith(".alpha"):
        module, half = name.removesuffix(".alpha"), "alpha"
    elif (match := _MAGNITUDE.fullmatch(name)) is not None:
        module, half = match["module"], "magnitude"
    elif (match := _HALF.fullmatch(name)) is not None:
        module = match["module"]
        half = "down" if (match["half"] or match["old"]) in ("A", "down") else "up"
    else:
        return None
    changed = True
    while changed and module not in linears:
        bare = next((module.removeprefix(each) for each in _PREFIXES if module.startswith(each)), module)
        changed, module = bare != module, bare
    if module not in linears and (kohya := _KOHYA.fullmatch(module)) is not None:
        module = by_flat_name.get(kohya["module"], "")
    if module not in linears and f"{module}.0" in linears:  # attn1.to_out of older writers
        module = f"{module}.0"
    return (module, half) if module in linears else None


def _halves(name: str, pair: _Pair, slot: Slot, path: str) -> tuple[Tensor, Tensor]:
    if pair.down is None or pair.up is None:
        which = "down (A)" if pair.down is None else "up (B)"
        raise LoraError(f"{path}: {name} has no {which} half: the file is not whole, download it again")
    shapes = tuple(pair.down.shape), tuple(pair.up.shape)
    rows, columns = slot.shape[0], slot.numel // slot.shape[0]
    is_matrix = pair.down.dim() == pair.up.dim() == 2
    if not is_matrix or pair.down.shape[1] != columns or pair.up.shape[0] != rows or shapes[0][0] != shapes[1][1]:
        raise LoraError(
            f"{path}: {name} is {rows} × {columns} here, but its halves are {shapes[0]} and {shapes[1]}, expected "
            f"(rank, {columns}) and ({rows}, rank): it is a LoRA of another model"
        )
    if shapes[0][0] == 0:
        raise LoraError(f"{path}: {name} has rank 0")
    return pair.down, pair.up


def _magnitude(name: str, pair: _Pair, rows: int, path: str) -> Tensor:
    if pair.magnitude is None:
        raise LoraError(f"{path}: {name} has no magnitude vector, and is one of DoRA: the file is not whole")
    if pair.magnitude.shape != (rows,):
        shape = tuple(pair.magnitude.shape)
        raise LoraError(f"{path}: {name} has {rows} rows here, but its magnitude vector is {shape}, expected ({rows},)")
    return pair.magnitude


def said_in(metadata: Mapping[str, str], path: str) -> Said:
    """What a file's metadata says: PEFT's configuration, by diffusers or by finetrainers.

    Raises:
        LoraError: it cannot be read.
    """
    texts = [metadata[key] for key in ("lora_adapter_metadata", "lora_config") if key in metadata]
    if not texts:
        return Said()
    try:
        held: Any = json.loads(texts[0])
        held = held if isinstance(held, dict) else {}
        if isinstance(held.get("transformer"), dict):
            held = held["transformer"]
        own = {key.removeprefix("transformer."): value for key, value in held.items() if not key.startswith("text_")}
        alpha = own.get("lora_alpha")
        patterns = dict(own.get("alpha_pattern") or {})
        numbers = [value for value in (alpha, *patterns.values()) if value is not None]
        if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in numbers):
            raise ValueError(f"lora_alpha is {alpha!r}")
    except (ValueError, TypeError) as error:
        raise LoraError(f"{path}: its metadata cannot be read ({error}): give Lora(path, weight, alpha=...)") from None
    return Said(
        alpha=alpha, alpha_pattern=patterns,
        use_rslora=bool(own.get("use_rslora")), use_dora=bool(own.get("use_dora")),
    )  # fmt: skip


__all__ = [
    "Delta", "Deltas", "Lora", "LoraError", "LoraLike", "Said", "as_lora", "as_loras", "deltas_of", "linear_slots",
    "read_loras", "said_in",
]  # fmt: skip
