"""What a CogVideoX transformer looks like: its configuration, and the five released ones by name.

Field names, meanings and defaults are those of diffusers' ``CogVideoXTransformer3DModel``: the
keys of its ``config.json``.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import numbers
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

FEED_FORWARD_ACTIVATIONS = ("gelu", "gelu-approximate", "geglu", "geglu-approximate", "swiglu", "linear-silu")
TIMESTEP_ACTIVATIONS = ("silu", "swish", "mish", "gelu", "relu")

UPSTREAM_CLASS = "CogVideoXTransformer3DModel"

_LEAST = {"freq_shift": 0}
"""Smallest value of an integer field; 1 where none is named."""
_MOST = {"num_layers": 1000, "patch_size": 256, "patch_size_t": 256, "sample_height": 4096, "sample_width": 4096}
"""Largest value of an integer field, ``_MOST_OF_ANY`` where none is named: far above every model, low enough that a
damaged file is refused before a model of that size is built."""
_MOST_OF_ANY = 65_536


_AVERAGE = (
    "decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power"
)  # fmt: skip
"""What diffusers' ``EMAModel`` writes about itself into the ``config.json`` of the averaged weights."""
_REGISTERED = "_registered"
"""Lists in our ``config.json`` the keys that ``register_to_config`` added; readers ignore keys that begin with "_"."""


class ConfigError(ValueError):
    """A configuration that no CogVideoX transformer can have; the message names the field, its value and the remedy."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TransformerConfig(dict[str, Any]):
    """Every field of diffusers' ``config.json`` for CogVideoX, checked when it is made.

    It reads as an object (``config.num_layers``) and is a dict that does not change (``config["num_layers"]``,
    ``**config``, ``json.dumps(config)``), as diffusers' ``FrozenDict`` is; other keys than the fields are only what
    ``register`` added. ``dataclasses.replace(config, num_layers=2)`` makes a changed, checked copy of the fields.

    Raises:
        ConfigError: a field has the wrong type or an impossible value, alone or together with another.
    """

    num_attention_heads: int = 30
    """Attention heads, N."""
    attention_head_dim: int = 64
    """Channels of one head, K; the model's width is D = N · K."""
    in_channels: int = 16
    """Latent channels read (32 for image-to-video: noise and image)."""
    out_channels: int = 16
    """Latent channels predicted."""
    flip_sin_to_cos: bool = True
    """Cosines before sines in the timestep embedding."""
    freq_shift: int = 0
    """Subtracted from the number of frequencies in the timestep embedding."""
    time_embed_dim: int = 512
    """Width of the timestep embedding."""
    ofs_embed_dim: int | None = None
    """Width of the "ofs" embedding of 1.5 image-to-video; must equal ``time_embed_dim``, for the two are added."""
    text_embed_dim: int = 4096
    """Width of the text encoder's output."""
    num_layers: int = 30
    """Transformer blocks, L."""
    dropout: float = 0.0
    """Probability of dropout after the embedding and in the feed-forward, in training."""
    attention_bias: bool = True
    """Bias in the query, key and value projections."""
    sample_width: int = 90
    """Width of the default video in latent pixels."""
    sample_height: int = 60
    """Height of the default video in latent pixels."""
    sample_frames: int = 49
    """Frames of the default video, before the VAE's temporal compression."""
    patch_size: int = 2
    """Latent pixels along each side of a patch."""
    patch_size_t: int | None = None
    """Latent frames in a patch (CogVideoX 1.5), or None (CogVideoX 1.0: one frame, projected by a convolution)."""
    temporal_compression_ratio: int = 4
    """Video frames per latent frame."""
    max_text_seq_length: int = 226
    """Text tokens of a full prompt."""
    activation_fn: str = "gelu-approximate"
    """Activation of the feed-forward, one of ``FEED_FORWARD_ACTIVATIONS``."""
    timestep_activation_fn: str = "silu"
    """Activation of the timestep embedding, one of ``TIMESTEP_ACTIVATIONS`` (case does not matter)."""
    norm_elementwise_affine: bool = True
    """Weights and biases in the layer norms over D."""
    norm_eps: float = 1e-5
    """Epsilon of the layer norms over D (the query and key norms use 1e-6)."""
    spatial_interpolation_scale: float = 1.875
    """Divides the spatial coordinates of the sin-cos positions."""
    temporal_interpolation_scale: float = 1.0
    """Divides the temporal coordinates of the sin-cos positions."""
    use_rotary_positional_embeddings: bool = False
    """Rotary positions (5b and later) in place of added sin-cos ones (2b)."""
    use_learned_positional_embeddings: bool = False
    """Learned positions, added besides the rotary ones (5b-i2v)."""
    patch_bias: bool = True
    """Bias in the patch projection (of no effect where ``patch_size_t`` is set: that one always has it)."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = _check_type(field.name, str(field.type), getattr(self, field.name))
            object.__setattr__(self, field.name, value)
        if self.ofs_embed_dim == 0:  # as upstream takes it
            object.__setattr__(self, "ofs_embed_dim", None)
        dict.update(self, {field.name: getattr(self, field.name) for field in dataclasses.fields(self)})
        _check_values(self)
        _check_combinations(self)

    @property
    def inner_dim(self) -> int:
        """Width of the model, D = num_attention_heads · attention_head_dim."""
        return self.num_attention_heads * self.attention_head_dim

    def grid(self, latent_frames: int, latent_height: int, latent_width: int) -> tuple[int, int, int]:
        """Patches along (time, height, width) for latents of that size; V is their product.

        Latent rows and columns that do not fill a patch are dropped, as upstream's convolution drops them.

        Raises:
            ValueError: the latents hold no whole patch, or 1.5's frames or sides are not a multiple of the patch.
        """
        p, p_t = self.patch_size, self.patch_size_t or 1
        sizes = {"frames": (latent_frames, p_t), "height": (latent_height, p), "width": (latent_width, p)}
        for name, (size, patch) in sizes.items():
            if size < patch:
                raise ValueError(f"latent {name} is {size}: at least one patch ({patch}) is needed")
            if self.patch_size_t is not None and size % patch:
                raise ValueError(
                    f"latent {name} is {size}, but this model takes patches of {patch}: pad it to "
                    f"{-(-size // patch) * patch} (the pipelines do so for frames) or choose another size"
                )
        return latent_frames // p_t, latent_height // p, latent_width // p

    @classmethod
    def preset(cls, name: str) -> TransformerConfig:
        """The configuration of a released model (see ``PRESETS``) by its exact name.

        Raises:
            ConfigError: there is no preset of that name.
        """
        if name not in PRESETS:
            raise ConfigError(f"preset {name!r} is not known: choose one of {', '.join(PRESETS)}")
        return PRESETS[name]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, origin: str = "config") -> TransformerConfig:
        """A configuration from the content of a diffusers ``config.json``; keys that begin with "_" are ignored.

        So is a ``quantization_config`` of torchao: what is quantized, and how, stands with the weights.

        Raises:
            ConfigError: it belongs to another model class, is quantized by another library than torchao, has unknown
                keys, or holds impossible values.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"{origin}: got a {type(data).__name__}, expected a mapping of the fields of config.json")
        class_name = data.get("_class_name", UPSTREAM_CLASS)
        if class_name != UPSTREAM_CLASS:
            raise ConfigError(
                f"{origin}: _class_name is {class_name!r}, expected {UPSTREAM_CLASS!r}: this is another model"
            )
        known = {field.name for field in dataclasses.fields(cls)}
        fields = {str(key): value for key, value in data.items() if not str(key).startswith("_")}
        _check_quantization(fields.pop("quantization_config", None), origin)
        added = {key: fields.pop(key) for key in (*_AVERAGE, *_registered(data)) if key in fields and key not in known}
        unknown = [key for key in fields if key not in known]
        if unknown:
            raise ConfigError(f"{origin}: unknown {_describe_unknown(unknown, known)}")
        try:
            return cls(**fields).register(**added)
        except ConfigError as error:
            raise ConfigError(f"{origin}: {error}") from None

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> TransformerConfig:
        """Read a diffusers ``config.json``.

        Raises:
            ConfigError: the file is no JSON object, or ``from_dict`` refuses it.
            OSError: the file cannot be read.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:  # also undecodable text and numbers of thousands of digits
            raise ConfigError(
                f"{path}: not valid JSON ({error}): restore the file, e.g. by downloading it again"
            ) from None
        return cls.from_dict(data, origin=str(path))

    def register(self, **values: Any) -> TransformerConfig:
        """A checked copy with other values of fields, or with keys of the caller's own beside them.

        Raises:
            ConfigError: a field has the wrong type or an impossible value.
        """
        fields = {name: values.get(name, getattr(self, name)) for name in self.__dataclass_fields__}
        copy = type(self)(**fields)
        dict.update(copy, {key: value for key, value in {**self, **values}.items() if key not in fields})
        return copy

    def to_dict(self) -> dict[str, Any]:
        """The content of diffusers' ``config.json`` (with ``_class_name``, without a diffusers version)."""
        added = [key for key in _public(self) if key not in self.__dataclass_fields__]
        return {"_class_name": UPSTREAM_CLASS, **self} | ({_REGISTERED: added} if added else {})

    def __getattr__(self, name: str) -> Any:  # of keys that are no fields
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no field or key {name!r}") from None

    def _is_frozen(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} does not change: make another with dataclasses.replace(config, ...), or call "
            "model.register_to_config(...)"
        )

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _is_frozen

    def __eq__(self, other: object) -> bool:
        """Whether fields and registered keys are the same; keys that begin with "_" do not matter."""
        if not isinstance(other, TransformerConfig):
            return dict.__eq__(self, other)
        return _public(self) == _public(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def copy(self) -> TransformerConfig:
        """The same again."""
        return self.register()

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (type(self), dict(self))

    __hash__ = None  # a mapping; compare with ==


def _public(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if not key.startswith("_")}


def _restore(kind: type[TransformerConfig], values: dict[str, Any]) -> TransformerConfig:
    """A configuration from all of its keys: how one is copied and unpickled."""
    known = kind.__dataclass_fields__
    return kind(**{key: value for key, value in values.items() if key in known}).register(**values)


def _check_type(name: str, annotation: str, value: Any) -> Any:
    """The value, as one of Python's own types."""
    optional = annotation.endswith("| None")
    kind = annotation.removesuffix(" | None")
    expected: dict[str, Any] = {"int": numbers.Integral, "float": numbers.Real, "bool": bool, "str": str}
    if value is None and optional:
        return None
    is_bool = isinstance(value, bool)
    if not isinstance(value, expected[kind]) or (is_bool and kind != "bool"):
        article = "an" if kind == "int" else "a"
        raise ConfigError(
            f"{name} is {value!r} ({type(value).__name__}), expected {article} {kind}{' or None' if optional else ''}"
        )
    if isinstance(value, numbers.Integral):
        return value if is_bool else int(value)
    return float(value) if kind == "float" else value


def _registered(data: Mapping[str, Any]) -> list[str]:
    added = data.get(_REGISTERED, [])
    return [key for key in added if isinstance(key, str)] if isinstance(added, list) else []


def _check_quantization(quantization: Any, origin: str) -> None:
    """Raise where weights are quantized by another library than torchao."""
    if quantization is None:
        return
    get = quantization.get if isinstance(quantization, Mapping) else lambda key: getattr(quantization, key, None)
    method = getattr(get("quant_method"), "value", get("quant_method"))
    if method != "torchao":
        raise ConfigError(
            f"{origin}: quantization_config has quant_method {method!r}, only 'torchao' can be read: load the original "
            "checkpoint in floating point and quantize it here"
        )


def _check_values(config: TransformerConfig) -> None:
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        if str(field.type).startswith("int") and value is not None:
            least, most = _LEAST.get(name, 1), _MOST.get(name, _MOST_OF_ANY)
            if not least <= value <= most:
                raise ConfigError(f"{name} is {value}, expected {least} to {most}")
    if config.inner_dim > _MOST_OF_ANY:
        raise ConfigError(
            f"num_attention_heads × attention_head_dim is {config.inner_dim}, expected {_MOST_OF_ANY} or less"
        )
    if not 0 <= config.norm_eps <= 1:
        raise ConfigError(f"norm_eps is {config.norm_eps}, expected a small number between 0 and 1 (released: 1e-05)")
    for name in ("spatial_interpolation_scale", "temporal_interpolation_scale"):
        if not 0 < getattr(config, name) <= _MOST_OF_ANY:
            raise ConfigError(f"{name} is {getattr(config, name)}, expected a number above 0, at most {_MOST_OF_ANY}")
    if not 0 <= config.dropout <= 1:
        raise ConfigError(f"dropout is {config.dropout}, expected a probability between 0 and 1")
    if config.activation_fn not in FEED_FORWARD_ACTIVATIONS:
        raise ConfigError(f"activation_fn is {config.activation_fn!r}, expected one of {FEED_FORWARD_ACTIVATIONS}")
    if config.timestep_activation_fn.lower() not in TIMESTEP_ACTIVATIONS:
        raise ConfigError(
            f"timestep_activation_fn is {config.timestep_activation_fn!r}, expected one of {TIMESTEP_ACTIVATIONS}"
        )


def _check_combinations(config: TransformerConfig) -> None:
    rotary, head_dim, inner = config.use_rotary_positional_embeddings, config.attention_head_dim, config.inner_dim
    if config.use_learned_positional_embeddings and not rotary:
        raise ConfigError(
            "use_learned_positional_embeddings is True while use_rotary_positional_embeddings is False: no CogVideoX "
            "model has learned positions alone; set use_rotary_positional_embeddings=True"
        )
    if rotary and head_dim % 16:
        raise ConfigError(
            f"attention_head_dim is {head_dim} with rotary positions, which split it into 1/4 time, 3/8 height and "
            "3/8 width of even size: use a multiple of 16"
        )
    if (not rotary or config.use_learned_positional_embeddings) and inner % 16:
        raise ConfigError(
            f"num_attention_heads × attention_head_dim is {inner}; added sin-cos positions need a multiple of 16"
        )
    if (config.patch_size_t or 1) > 1 and (not rotary or config.use_learned_positional_embeddings):
        raise ConfigError(
            f"patch_size_t is {config.patch_size_t} with added positions, which are one for each latent frame: use "
            "use_rotary_positional_embeddings=True and use_learned_positional_embeddings=False, or patch_size_t=None"
        )
    if config.ofs_embed_dim is not None and config.ofs_embed_dim != config.time_embed_dim:
        raise ConfigError(
            f"ofs_embed_dim is {config.ofs_embed_dim} and time_embed_dim is {config.time_embed_dim}: the two are "
            "added, so make them equal"
        )
    needs_whole_patches = config.use_learned_positional_embeddings and config.patch_size_t
    for name in ("sample_height", "sample_width"):
        size = getattr(config, name)
        if size < config.patch_size:
            raise ConfigError(f"{name} is {size}, less than one patch (patch_size {config.patch_size})")
        if needs_whole_patches and size % config.patch_size:
            raise ConfigError(
                f"{name} is {size} with learned positions, which are for that size only, and with patch_size_t, which "
                f"needs whole patches: use a multiple of patch_size ({config.patch_size})"
            )
    for width, half in (("the model's width", inner // 2), ("ofs_embed_dim", (config.ofs_embed_dim or 0) // 2)):
        if 0 < half <= config.freq_shift:
            raise ConfigError(f"freq_shift is {config.freq_shift}, expected less than half of {width} ({half})")


def _describe_unknown(unknown: list[str], known: set[str]) -> str:
    words = []
    for key in unknown[:5]:
        near = difflib.get_close_matches(key, known, n=1)
        words.append(repr(key) + (f" (did you mean {near[0]!r}?)" if near else ""))
    more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
    return f"field{'s' if len(unknown) > 1 else ''} {', '.join(words)}{more}: remove or correct"


_FIVE_B: dict[str, Any] = {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True}
_ONE_FIVE: dict[str, Any] = {
    **_FIVE_B, "patch_size_t": 2, "patch_bias": False, "sample_height": 300, "sample_width": 300, "sample_frames": 81
}  # fmt: skip

PRESETS: dict[str, TransformerConfig] = {
    "2b": TransformerConfig(),
    "5b": TransformerConfig(**_FIVE_B),
    "5b-i2v": TransformerConfig(**_FIVE_B, in_channels=32, use_learned_positional_embeddings=True),
    "1.5-5b": TransformerConfig(**_ONE_FIVE),
    "1.5-5b-i2v": TransformerConfig(**_ONE_FIVE, in_channels=32, ofs_embed_dim=512),
    "tiny": TransformerConfig(
        num_attention_heads=3, num_layers=6, in_channels=8, out_channels=8, time_embed_dim=128, text_embed_dim=64,
        max_text_seq_length=8, sample_height=8, sample_width=8, sample_frames=17, use_rotary_positional_embeddings=True,
    ),
}  # fmt: skip
"""The released transformers by name (facts: each model's ``config.json`` on the hub), and ours, ``tiny``."""

HUB_IDS: dict[str, str] = {
    "2b": "THUDM/CogVideoX-2b",
    "5b": "THUDM/CogVideoX-5b",
    "5b-i2v": "THUDM/CogVideoX-5b-I2V",
    "1.5-5b": "THUDM/CogVideoX1.5-5B",
    "1.5-5b-i2v": "THUDM/CogVideoX1.5-5B-I2V",
}
"""Where each released transformer lives on the hub."""
