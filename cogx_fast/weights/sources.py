"""From what a user names (a directory, a file, a hub id) to the files that hold config and weights."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogx_fast.config import HUB_IDS, PRESETS, TransformerConfig
from cogx_fast.weights.errors import CheckpointError, CheckpointNotFoundError, some
from cogx_fast.weights.headers import Stored, read_header, read_metadata

STEM = "diffusion_pytorch_model"
CONFIG_NAME = "config.json"
SAFE, PICKLED = ".safetensors", ".bin"
"""How files of weights end: the format that is read here, and the one that is only written."""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

ConfigLike = TransformerConfig | Mapping[str, Any] | str | os.PathLike[str]


def weights_name(variant: str | None, suffix: str = SAFE) -> str:
    """Name that diffusers gives the file that holds all weights."""
    return f"{_stem(variant)}{suffix}"


def shard_name(variant: str | None, index: int, count: int, suffix: str = SAFE) -> str:
    """Name that diffusers gives shard ``index`` (from 1) of ``count``."""
    return f"{_stem(variant)}-{index:05d}-of-{count:05d}{suffix}"


def index_name(variant: str | None, suffix: str = SAFE) -> str:
    """Name that diffusers gives the file that says which shard holds what."""
    return f"{STEM}{suffix}.index.{variant + '.' if variant else ''}json"


def recipe_name(variant: str | None) -> str:
    """Name of the file that holds a copy of the recipe of quantized weights."""
    return f"recipe.{variant}.toml" if variant else "recipe.toml"


def _stem(variant: str | None) -> str:
    return f"{STEM}.{variant}" if variant else STEM


@dataclass(frozen=True, kw_only=True)
class Source:
    """A checkpoint on disk: where its configuration and its weights are."""

    config: TransformerConfig
    weights: Path
    """A .safetensors file, or the index of several."""

    def headers(self) -> dict[str, Stored]:
        """Every tensor that the files hold, by name, file after file.

        Raises:
            CheckpointError: a file is damaged or missing, or files and index disagree.
        """
        if self.weights.suffix == ".json":
            return _read_shards(self.weights)
        return read_header(self.weights)

    def metadata(self, stored: Mapping[str, Stored]) -> list[dict[str, str]]:
        """The free text in the header of each of the files that hold these tensors."""
        return [read_metadata(path) for path in sorted({tensor.path for tensor in stored.values()})]


def resolve(
    source: str | os.PathLike[str],
    *,
    config: ConfigLike | None = None,
    variant: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Source:
    """Find the files of a checkpoint (arguments as in ``cogx_fast.load``).

    Raises:
        CheckpointNotFoundError: nothing is there, or a file that belongs to it is missing.
        CheckpointError: there is something else than a checkpoint.
        ConfigError: the configuration is no CogVideoX transformer's.
    """
    given = None if config is None else read_config(config)
    path = Path(os.path.expanduser(os.fspath(source)))
    if not path.exists():
        name = HUB_IDS.get(os.fspath(source), os.fspath(source))
        if not _HUB_ID.fullmatch(name):
            raise CheckpointNotFoundError(
                f"{source}: no such file or directory: give one, a .safetensors file, a hub id such as "
                f"'THUDM/CogVideoX-5b', or one of {', '.join(HUB_IDS)}"
            )
        from cogx_fast.weights.hub import download

        path = download(name, _hub_patterns(variant), revision=revision, cache_dir=cache_dir, local=local_files_only)
    weights = find_weights(path, variant) if path.is_dir() else _check_file(path)
    return Source(config=given or _config_beside(weights), weights=weights)


def read_config(config: ConfigLike) -> TransformerConfig:
    """A configuration from an object, a mapping, a preset's name, or the path of a config.json or its directory."""
    if isinstance(config, TransformerConfig):
        return config
    if isinstance(config, Mapping):
        return TransformerConfig.from_dict(config)
    if config in PRESETS:
        return TransformerConfig.preset(str(config))
    path = Path(os.path.expanduser(config))
    if path.is_dir():
        path = path / CONFIG_NAME
    if not path.is_file():
        raise CheckpointNotFoundError(
            f"config {str(config)!r} is neither a file nor a preset: give the path of a {CONFIG_NAME} or one of "
            f"{', '.join(PRESETS)}"
        )
    return TransformerConfig.from_json(path)


def find_weights(directory: Path, variant: str | None) -> Path:
    """The weights file or index in a transformer's directory, or in the ``transformer`` directory of a pipeline's.

    Raises:
        CheckpointNotFoundError: there is none, or of another variant or kind only.
    """
    inner = directory / "transformer"
    if inner.is_dir() and ((directory / "model_index.json").is_file() or not (directory / CONFIG_NAME).is_file()):
        directory = inner
    for name in (index_name(variant), weights_name(variant)):  # upstream's order
        if (directory / name).is_file():
            return directory / name
    found = sorted(entry.name for entry in directory.iterdir() if entry.is_file() and not entry.name.startswith("."))
    wanted = f"{directory}: no {weights_name(variant)} and no {index_name(variant)}"
    others = [name for name in found if name.startswith(STEM)]
    ggufs = [name for name in found if name.endswith(".gguf")]
    if ggufs and not others:
        raise CheckpointError(f"{directory / ggufs[0]}: {_GGUF}")
    if any(name.endswith(_PICKLES) for name in others):
        raise CheckpointError(f"{wanted}, only {some(others)}: {_PICKLE_ADVICE}")
    if others:
        raise CheckpointNotFoundError(
            f"{wanted}, but {some(others)}: pass variant=... for files named {STEM}.<variant>.safetensors, or restore "
            "what is missing"
        )
    raise CheckpointNotFoundError(
        f"{wanted} (it holds {some(found) or 'nothing'}): give the directory that diffusers' save_pretrained wrote, or "
        "its transformer folder"
    )


_PICKLE_ADVICE = (
    "pickled weights can run any code when they are read and are never loaded here; convert them where you trust them, "
    "with diffusers: CogVideoXTransformer3DModel.from_pretrained(DIR).save_pretrained(NEW_DIR)"
)


_GGUF = (
    "a GGUF file, quantized by llama.cpp's tools: load the original checkpoint in floating point and quantize it here"
)


def _check_file(path: Path) -> Path:
    if path.suffix == ".gguf":
        raise CheckpointError(f"{path}: {_GGUF}")
    if path.name.endswith(_PICKLES):
        raise CheckpointError(f"{path}: {_PICKLE_ADVICE}")
    if path.suffix != ".safetensors" and not path.name.endswith(".json"):
        raise CheckpointError(f"{path}: expected a .safetensors file, the index of several, or a directory of them")
    if path.name == CONFIG_NAME or path.name == "model_index.json":
        raise CheckpointError(f"{path}: a configuration, not weights: give its directory")
    return path


def _config_beside(weights: Path) -> TransformerConfig:
    path = weights.parent / CONFIG_NAME
    if not path.is_file():
        raise CheckpointNotFoundError(
            f"{path}: no such file, so the sizes of {weights.name} are not known: restore it or pass config=... (a "
            f"path, a dict, or one of {', '.join(PRESETS)})"
        )
    return TransformerConfig.from_json(path)


def _read_shards(index: Path) -> dict[str, Stored]:
    weight_map = read_index(index)
    stored: dict[str, Stored] = {}
    for shard in sorted(set(weight_map.values())):
        if not (index.parent / shard).is_file():
            raise CheckpointNotFoundError(f"{index}: names the shard {shard}, which is not there: restore it")
        for name, tensor in read_header(index.parent / shard).items():
            if weight_map.get(name) != shard:
                raise CheckpointError(
                    f"{index}: says {name} is in {weight_map.get(name, 'no shard')}, but {shard} holds it: index and "
                    "shards are not of one checkpoint, restore them"
                )
            stored[name] = tensor
    absent = [name for name in weight_map if name not in stored]
    if absent:
        raise CheckpointError(f"{index}: names {some(absent)}, which the shards do not hold: restore the files")
    return stored


def read_index(path: Path, suffix: str = SAFE) -> dict[str, str]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}): restore the file") from None
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: has no weight_map from tensor to shard: restore the file")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(suffix) or os.path.basename(shard) != shard:
            raise CheckpointError(f"{path}: {name} is in {shard!r}, expected the name of a {suffix} file beside it")
    return weight_map


def _hub_patterns(variant: str | None) -> list[str]:
    """The files of one variant of a transformer, in a pipeline's repository or in one of its own."""
    names = [CONFIG_NAME, index_name(variant), weights_name(variant), f"{_stem(variant)}-?????-of-?????.safetensors"]
    return [f"transformer/{name}" for name in names] + names


__all__ = [
    "CONFIG_NAME",
    "PICKLED",
    "SAFE",
    "STEM",
    "ConfigLike",
    "Source",
    "find_weights",
    "index_name",
    "read_config",
    "recipe_name",
    "resolve",
    "shard_name",
    "weights_name",
]
