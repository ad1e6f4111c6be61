"""What diffusers' pipelines, which ask for their own classes, take for their transformer. Importing it needs diffusers.

The class stands in a module of its own, so that its models can be pickled: workers import it by this name.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import diffusers
import torch
from diffusers import CogVideoXTransformer3DModel as Upstream
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention import FeedForward as TheirFeedForward
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.training_utils import EMAModel
from diffusers.utils import deprecate
from torch import Tensor, nn

from cogx_fast.attention.backends import BACKENDS, Backend
from cogx_fast.config import TransformerConfig
from cogx_fast.model.layers import FeedForward
from cogx_fast.model.tables import sincos_table
from cogx_fast.model.transformer import Attention
from cogx_fast.runtime.attached import AttachedError, check_processor
from cogx_fast.runtime.for_diffusers.averages import follow_layout
from cogx_fast.runtime.for_diffusers.diffusers_adapters import AdapterMethods
from cogx_fast.runtime.module import CogVideoXModel
from cogx_fast.sizes import own_grid

_LOADING = ("dtype", "torch_dtype", "variant", "revision", "cache_dir", "local_files_only")
"""What ``from_pretrained`` takes besides the path and ``subfolder``."""
_KNOWN = (*_LOADING, "use_safetensors", "low_cpu_mem_usage", "disable_mmap")
"""And what says how diffusers reads files; here there is one way, which does what is asked by them."""


class _EqualsUpstream(type):
    """The type of a class that compares equal to diffusers' own: ``from_pipe`` hands over exact types only."""

    def __eq__(cls, other: object) -> bool:
        return cls is other or other is Upstream

    def __hash__(cls) -> int:
        return hash(Upstream)


class _UpstreamInterface(Upstream):
    """Upstream's class without its construction: what a pipeline may ask of a transformer."""

    def __init__(self) -> None:
        nn.Module.__init__(self)


class UpstreamAttention(Attention, AttentionModuleMixin):
    """Attention as diffusers' functions look for it: what they would set on it, or hook into it, is checked."""

    _supports_qkv_fusion = False  # query, key and value are one from the start

    @property
    def is_cross_attention(self) -> NoReturn:
        """Refuse what works on diffusers' attention."""
        raise AttachedError(
            "this asks for diffusers' attention, with query, key and value apart, which are one projection in this "
            "model: use diffusers' own transformer with it"
        )

    @property
    def processor(self) -> Any:
        """The attention backend."""
        return BACKENDS[self.backend]

    @processor.setter
    def processor(self, processor: Any) -> None:
        check_processor(processor)
        if isinstance(processor, Backend) and processor.name != self.backend:
            self.set_attention_backend(processor.name)

    def set_attention_backend(self, backend: str) -> NoReturn:
        """Refuse: all layers have the same."""
        raise ValueError(f"attention backend {backend!r} for one layer: call the model's set_attention_backend")


class UpstreamFeedForward(FeedForward, TheirFeedForward):
    """The feed-forward as diffusers' functions look for it."""


class CogVideoXTransformer3DModel(AdapterMethods, CogVideoXModel, _UpstreamInterface, metaclass=_EqualsUpstream):
    """``CogVideoXModel`` as a diffusers model: it shares none of upstream's forward, weights' layout or files.

    Args:
        config: its sizes and options; or each of them by its name, as upstream's constructor takes them.
        attention: as of ``CogVideoXModel``.
    """

    _no_split_modules: ClassVar = ["Block", "PatchEmbed"]
    _repeated_blocks: ClassVar = ["Block"]
    _skip_layerwise_casting_patterns: ClassVar = ["patch_embed", "norm", "modulation"]  # upstream: in the norms

    def __init__(self, config: TransformerConfig | None = None, *, attention: str = "sdpa", **fields: Any) -> None:
        if config is not None and fields:
            raise TypeError(f"a config and fields of one ({', '.join(fields)}) are given: give one of both")
        super().__init__(TransformerConfig.from_dict(fields) if config is None else config, attention=attention)
        for block in self.transformer_blocks:
            block.attn1.__class__, block.ff.__class__ = UpstreamAttention, UpstreamFeedForward
        # Pipelines write class and module of their parts into model_index.json. On disk this model is upstream's.
        self.__module__ = Upstream.__module__

    def _output(self, sample: Tensor) -> Any:
        return Transformer2DModelOutput(sample=sample)

    # -- diffusers' ConfigMixin ----------------------------------------------------------------------------------------

    @property
    def _internal_dict(self) -> TransformerConfig:
        return self.config

    def __getattr__(self, name: str) -> Any:
        registered = self.__dict__.get("_registered")
        if registered is not None and name in registered:
            message = f"read {name!r} from the model's config: model.config.{name}"
            deprecate("direct config name access", "1.0.0", message, standard_warn=False, stacklevel=3)
            return registered[name]
        return nn.Module.__getattr__(self, name)

    def to_json_string(self) -> str:
        """The content of ``config.json``."""
        content = self.config.to_dict() | {"_diffusers_version": diffusers.__version__}
        return json.dumps(content, indent=2, sort_keys=True, default=_as_json) + "\n"

    def save_config(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **_: Any) -> None:
        """Write ``config.json`` into a directory, which is made if it is not there.

        Raises:
            ValueError: ``push_to_hub`` is given: nothing is uploaded from here.
        """
        if push_to_hub:
            raise ValueError("push_to_hub=True, but nothing is uploaded from here: use huggingface_hub.upload_folder")
        super().save_config(save_directory)

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Any:
        """A model of that configuration with random weights, as upstream's.

        Args:
            config: a mapping, or where a ``config.json`` is (``load_config``).
            return_unused_kwargs: also return what is neither a field of the configuration nor private.
            **kwargs: fields in place of those in ``config``.

        Returns:
            The model, or ``(model, unused)``.

        Raises:
            ConfigError: (a ValueError) it is another model's, or a field has an impossible value.
        """
        config = kwargs.pop("pretrained_model_name_or_path", config)
        if config is None:
            raise ValueError("no config is given: pass one, e.g. another model's .config")
        if isinstance(config, Mapping):
            given = dict(config)
        else:
            given, kwargs = cls.load_config(config, return_unused_kwargs=True, **kwargs)
        known = {field.name for field in dataclasses.fields(TransformerConfig)}
        fields = {key: value for key, value in {**given, **kwargs}.items() if key in known or key == "_class_name"}
        model = cls(TransformerConfig.from_dict(fields))
        _begin_positions(model)
        added = {key: value for key, value in given.items() if key not in known and key not in _OF_THE_FILE}
        model.register_to_config(**added)
        unused = {key: value for key, value in {**given, **kwargs}.items() if key not in known}
        return (model, unused) if return_unused_kwargs else model

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *, subfolder: str | None = None, **kwargs: Any
    ) -> CogVideoXTransformer3DModel:
        """Load a checkpoint as upstream's ``from_pretrained`` does: in fp32 where no ``torch_dtype`` is given.

        ``cogx_fast.load`` takes more, and keeps weights in the dtype that they are stored in.

        Args:
            pretrained_model_name_or_path: a directory or a hub id.
            subfolder: where in it the transformer is.
            **kwargs: ``torch_dtype`` (or ``dtype``), ``variant``, ``revision``, ``cache_dir``, ``local_files_only``.

        Raises:
            ValueError: another argument of upstream's is given.
        """
        from cogx_fast.loading import load_weights

        odd = [name for name, value in kwargs.items() if name not in _KNOWN and value not in (None, False)]
        if odd:
            raise ValueError(
                f"{', '.join(odd)} is given, but from_pretrained takes {', '.join(_LOADING)} and subfolder here: call "
                "cogx_fast.load(path, dtype=..., device=..., quant=...)"
            )
        path = Path(pretrained_model_name_or_path)
        if subfolder is not None and path.is_dir():
            path = path / subfolder
        elif subfolder not in (None, "", "transformer"):  # the one that is looked for in a repository anyway
            raise ValueError(f"subfolder is {subfolder!r}, expected 'transformer' of a hub id: give the directory")
        dtypes = (kwargs.pop("dtype", None), kwargs.pop("torch_dtype", None))
        dtype = next((dtype for dtype in dtypes if dtype is not None), "fp32")
        options = {name: value for name, value in kwargs.items() if name in _LOADING and value is not None}
        source = path if path.exists() else pretrained_model_name_or_path
        model = load_weights(source, cls, attention="sdpa", compiled=False, dtype=dtype, **options)
        assert isinstance(model, cls)
        return model

    # -- what cannot be ------------------------------------------------------------------------------------------------

    def enable_cache(self, config: Any) -> NoReturn:
        """Refuse diffusers' caches."""
        raise ValueError(
            f"{type(config).__name__} hooks into the separate text and video streams of diffusers' blocks, which "
            "this model does not have: use diffusers' own transformer with it"
        )

    def enable_parallelism(self, **_: Any) -> NoReturn:
        """Refuse to split the stream over devices."""
        raise ValueError(
            "diffusers' plans split the streams of its own blocks, which this model does not have: use "
            "cogx_fast.accelerate(pipe, parallel=...)"
        )


_OF_THE_FILE = ("_class_name", "_diffusers_version", "_registered", "_use_default_values", "quantization_config")
"""What a ``config.json`` says of itself or of the weights beside it, which a new model has no part in."""


@torch.no_grad()
def _begin_positions(model: CogVideoXModel) -> None:
    """Learned positions as upstream's begin: the sin-cos ones. They are a buffer, which averages leave as it is."""
    config = model.config
    if not config.use_learned_positional_embeddings or model.device.type == "meta":
        return
    positions: Any = model.patch_embed.pos_embedding
    positions[:, config.max_text_seq_length :] = sincos_table(config, own_grid(config), model.device)


def _as_json(value: Any) -> Any:
    """What ``json`` cannot write, as upstream writes it."""
    if isinstance(value, Path):
        return value.as_posix()
    for method in ("to_dict", "tolist"):
        convert: Callable[[], Any] | None = getattr(value, method, None)
        if callable(convert):
            return convert()
    raise TypeError(f"{value!r} was registered in the config, but cannot be written to config.json: use plain values")


# Training scripts give it our parameters and upstream's class, and there is no other place where the two meet.
EMAModel.step, EMAModel.copy_to = follow_layout(EMAModel.step), follow_layout(EMAModel.copy_to)

__all__ = ["CogVideoXTransformer3DModel"]
