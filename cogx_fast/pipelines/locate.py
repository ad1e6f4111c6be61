"""What a user's word for a model means: a directory, a file, a hub id, a released model's short name.

Only small JSON files and the headers of weight files are read here.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogx_fast.config import HUB_IDS, PRESETS, TransformerConfig
from cogx_fast.sizes import RELEASED_SPATIAL_FACTOR, Tokens, VideoSize, choose_video, count_tokens
from cogx_fast.weights.errors import CheckpointError, CheckpointNotFoundError
from cogx_fast.weights.quantized import describe
from cogx_fast.weights.sources import Source, find_weights

INDEX = "model_index.json"
_VAE, _TRANSFORMER, _CONFIG = "vae/config.json", "transformer/config.json", "config.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class ModelNotFoundError(ValueError):
    """There is no such model, or it is something else; the message says what was looked for and what to give."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model that was found."""

    name: str
    """As the user called it."""
    config: TransformerConfig
    kind: str
    """What it was found as: "preset", "pipeline", "transformer", "configuration"."""
    location: str | None = None
    """Directory, file or hub id to load from; None for a preset or a lone configuration."""
    pipeline_class: str | None = None
    """For pipelines: diffusers' class, from ``model_index.json``."""
    spatial_factor: int = RELEASED_SPATIAL_FACTOR
    """Pixels along a latent pixel's side."""
    weights: Path | None = None
    """File or index of the transformer's weights, if on this machine."""

    def video(self, **size: int | None) -> VideoSize:
        """A video of that ``frames``, ``height`` and ``width``; what is None or left out is the model's own.

        Raises:
            ValueError: the model cannot make it (``sizes.choose_video``).
        """
        return choose_video(self.config, **size, spatial_factor=self.spatial_factor)

    def tokens(self, video: VideoSize) -> Tokens:
        """Tokens of a video that ``video`` gave."""
        return count_tokens(self.config, video, spatial_factor=self.spatial_factor)


@dataclass(frozen=True, kw_only=True)
class StoredWeights:
    """What the headers of weight files say."""

    files: int
    bytes: int
    parameters: int
    dtypes: Mapping[str, int]
    """Values of each dtype, by safetensors' names ("BF16"), the most frequent first."""


def locate(name: str) -> Model:
    """Find a model's configuration.

    Args:
        name: a preset (``5b``), a pipeline's or transformer's directory, its ``config.json``, a ``.safetensors`` file
            with one beside it, or a hub id.

    Raises:
        ModelNotFoundError: nothing of that name, or no CogVideoX transformer.
        ConfigError: (a ValueError) its configuration is impossible.
        CheckpointNotFoundError: (a FileNotFoundError) the hub has none, or cannot be reached.
    """
    path = Path(name).expanduser()
    if name in PRESETS:
        return Model(name=name, config=PRESETS[name], kind="preset")
    if path.is_dir():
        return _from_directory(name, path)
    if path.is_file():
        return _from_file(name, path)
    if _HUB_ID.fullmatch(name) and path.suffix not in (".safetensors", ".json"):
        return _from_hub(name)
    raise ModelNotFoundError(
        f"{name!r} is no file or directory here, no hub id (owner/name) and no preset: presets are {', '.join(PRESETS)}"
    )


def locate_pipeline(name: str) -> Model:
    """Find a whole pipeline: its directory, its hub id, ``tiny``, or a released model's short name.

    Raises:
        ModelNotFoundError, ConfigError, CheckpointNotFoundError: as ``locate``; the first also where there is a
            transformer but no pipeline.
    """
    if name == "tiny":
        from cogx_fast.assets import tiny_pipeline_dir

        return dataclasses.replace(_from_directory(name, tiny_pipeline_dir()), name=name)
    model = locate(HUB_IDS.get(name, name))
    if model.pipeline_class is None:
        raise ModelNotFoundError(
            f"{name!r} is a {model.kind}, expected a pipeline: a directory or hub id with {INDEX}, which holds the "
            "text encoder and the VAE as well"
        )
    return model


def read_stored_weights(model: Model) -> StoredWeights | None:
    """Parameters and dtypes from the headers of the model's weight files; None where it has none here.

    Raises:
        CheckpointError: (a ValueError) a file is damaged or missing.
    """
    if model.weights is None:
        return None
    source = Source(config=model.config, weights=model.weights)
    headers = source.headers()
    quantized = describe(headers, source.metadata(headers), model.config, str(model.weights))
    dtypes: Counter[str] = Counter()
    for name, tensor in headers.items():
        if not name.endswith("pos_embedding"):  # a buffer
            dtypes[tensor.dtype] += math.prod(tensor.shape)
    files = {tensor.path for tensor in headers.values()}
    return StoredWeights(
        files=len(files),
        bytes=sum(file.stat().st_size for file in files),
        parameters=quantized.parameters if quantized else dtypes.total(),
        dtypes=dict(dtypes.most_common()),
    )


def _from_directory(name: str, directory: Path) -> Model:
    if (directory / INDEX).is_file():
        return _pipeline(name, directory)
    if (directory / _CONFIG).is_file():
        config = TransformerConfig.from_json(directory / _CONFIG)
        return Model(name=name, config=config, kind="transformer", location=str(directory), weights=_weights(directory))
    raise ModelNotFoundError(
        f"{name!r} has neither {INDEX} (a pipeline) nor {_CONFIG} (a transformer): point at a CogVideoX model in "
        "diffusers' format"
    )


def _from_file(name: str, path: Path) -> Model:
    if path.name == INDEX:
        return _from_directory(name, path.parent)
    if path.suffix == ".json":
        return Model(name=name, config=TransformerConfig.from_json(path), kind="configuration")
    if path.suffix != ".safetensors":
        raise ModelNotFoundError(f"{name!r} is a {path.suffix or 'plain'} file, expected .safetensors or {_CONFIG}")
    beside = path.with_name(_CONFIG)
    if not beside.is_file():
        raise ModelNotFoundError(f"{name!r} has no {_CONFIG} beside it, which says what model it is: put it there")
    config = TransformerConfig.from_json(beside)
    return Model(name=name, config=config, kind="transformer", location=str(path), weights=path)


def _from_hub(hub_id: str) -> Model:
    from cogx_fast.weights.hub import download

    try:
        directory = download(hub_id, [INDEX, _VAE, _TRANSFORMER, _CONFIG])
    except CheckpointNotFoundError as error:
        known = next((preset for preset, known_id in HUB_IDS.items() if known_id == hub_id), None)
        hint = f" ('cogx-fast info {known}' needs no files)" if known else ""
        raise CheckpointNotFoundError(f"{error}{hint}") from None
    return dataclasses.replace(_from_directory(hub_id, directory), location=hub_id)


def _pipeline(name: str, directory: Path) -> Model:
    index = _read_json(directory / INDEX)
    pipeline_class = str(index.get("_class_name"))
    if "transformer" not in index or not pipeline_class.startswith("CogVideoX"):
        raise ModelNotFoundError(f"{name!r} is a {pipeline_class}, expected a CogVideoX pipeline")
    for part in (_VAE, _TRANSFORMER):
        if not (directory / part).is_file():
            raise ModelNotFoundError(f"{name!r} has no {part}, which {INDEX} promises: restore it")
    blocks = _read_json(directory / _VAE).get("block_out_channels")
    return Model(
        name=name,
        config=TransformerConfig.from_json(directory / _TRANSFORMER),
        kind="pipeline",
        location=str(directory),
        pipeline_class=pipeline_class,
        spatial_factor=2 ** (len(blocks) - 1) if isinstance(blocks, list) and blocks else RELEASED_SPATIAL_FACTOR,
        weights=_weights(directory),
    )


def _weights(directory: Path) -> Path | None:
    try:
        return find_weights(directory, None)
    except CheckpointError:  # none here, or of a kind that is not read
        return None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelNotFoundError(f"{path}: not valid JSON ({error}): restore the file") from None
    if not isinstance(data, dict):
        raise ModelNotFoundError(f"{path}: got a JSON {type(data).__name__}, expected an object")
    return data


__all__ = ["Model", "ModelNotFoundError", "StoredWeights", "locate", "locate_pipeline", "read_stored_weights"]
