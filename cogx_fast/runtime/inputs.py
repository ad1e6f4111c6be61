"""What a call's arguments become before the traced forward: checked, with tables and masks made once for each size."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from cogx_fast.config import ConfigError, TransformerConfig
from cogx_fast.model.attention import Mask, Rotary
from cogx_fast.model.backends import BACKENDS
from cogx_fast.model.masks import full_block_mask
from cogx_fast.model.tables import Grid, join_rotary, rotary_tables, sincos_table
from cogx_fast.model.transformer import Attention, Block, CogVideoXTransformer
from cogx_fast.runtime.plan import AttentionPlan, GridPlan

_TABLES_HELD = 8
_OF_THE_VIDEO = ("sample_height", "sample_width", "sample_frames", "max_text_seq_length")
"""Fields that pipelines read for their defaults and that no weight depends on, but for learned positions."""


class InputPreparation(CogVideoXTransformer):
    """The transformer with what turns diffusers' arguments into its own.

    Args:
        config: its sizes and options.
        attention: the attention backend, a name from ``cogx_fast.model.backends.BACKENDS``.
    """

    def __init__(self, config: TransformerConfig, *, attention: str = "sdpa") -> None:
        super().__init__(config, attention=attention)
        self._config = config  # as it was built; ``config`` may say other sizes of the default video since
        self._registered = config
        self._told_dtypes: set[tuple[torch.dtype, ...]] = set()
        self._tables: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
        self._plan: AttentionPlan | None = None

    @property
    def config(self) -> TransformerConfig:
        """The configuration, readable as an object and as a dict."""
        return self._registered

    def register_to_config(self, **values: Any) -> None:
        """Change what the configuration says of the default video, or note keys of the caller's own in it.

        Raises:
            ConfigError: (a ValueError) a field that the model was built by has another value, or one is impossible.
        """
        fields = dataclasses.asdict(self._registered)
        built = [name for name in fields if name in values and values[name] != fields[name]]
        changed = [name for name in built if name not in _OF_THE_VIDEO]
        if self._config.use_learned_positional_embeddings:  # these are for that size alone
            changed = built
        if changed:
            raise ConfigError(
                f"register_to_config would have the config say {', '.join(f'{n}={values[n]!r}' for n in changed)}, but "
                f"the model was built with {', '.join(f'{n}={fields[n]!r}' for n in changed)}, and so its weights are "
                "written and read: build another model with that configuration"
            )
        self._registered = self._registered.register(**values)
        self._tables.clear()

    @property
    def attention_backends(self) -> dict[str, None]:
        """Names of the attention backends in use, usually one."""
        return dict.fromkeys(attention.backend for attention in self._attentions())

    def _attentions(self) -> Iterator[Attention]:
        return (cast(Block, block).attn1 for block in self.transformer_blocks)

    def _check_inputs(self, latents: Tensor, text: Tensor, timestep_cond: Tensor | None, ofs: Any) -> Grid:
        config = self.config
        if latents.dim() != 5 or latents.shape[2] != config.in_channels:
            raise ValueError(
                f"hidden_states has shape {tuple(latents.shape)}, expected (batch, latent frames, "
                f"{config.in_channels} channels, latent height, latent width)"
            )
        if text.dim() != 3 or text.shape[2] != config.text_embed_dim or text.shape[0] != latents.shape[0]:
            raise ValueError(
                f"encoder_hidden_states has shape {tuple(text.shape)}, expected (batch {latents.shape[0]}, "
                f"text tokens, {config.text_embed_dim})"
            )
        if timestep_cond is not None:
            raise ValueError("timestep_cond is given, but no CogVideoX model has a projection for it: pass None")
        if self.ofs_embedding is not None and ofs is None:
            raise ValueError(
                "ofs is None, but this model (1.5 image-to-video) needs it: pass 2.0, as the pipeline does"
            )
        return config.grid(latents.shape[1], latents.shape[3], latents.shape[4])

    def _in_own_dtype(self, latents: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Both in the dtype of the weights, with one warning where that changes them."""
        for name, tensor in (("hidden_states", latents), ("encoder_hidden_states", text)):
            if not tensor.is_floating_point():
                raise ValueError(f"{name} is {tensor.dtype}, expected a floating-point dtype, best the weights' own")
        weight: Any = getattr(self.patch_embed.proj, "weight", None)
        if not isinstance(weight, Tensor) or weight.dtype.itemsize == 1:
            return latents, text
        dtypes = (latents.dtype, text.dtype, weight.dtype)
        if dtypes.count(weight.dtype) == len(dtypes):
            return latents, text
        if not latents.is_meta and torch.is_autocast_enabled(latents.device.type):  # torch knows none for meta
            return latents, text
        if dtypes not in self._told_dtypes and not torch.compiler.is_compiling():
            self._told_dtypes.add(dtypes)
            given, own = (str(dtype).removeprefix("torch.") for dtype in (dtypes[0], weight.dtype))
            warnings.warn(
                f"hidden_states is {dtypes[0]}, encoder_hidden_states is {dtypes[1]} and the weights are "
                f"{weight.dtype}: the call is computed in {own}. Have all in one dtype: load the model with "
                f"dtype={given!r}, or the pipeline with torch_dtype={weight.dtype}",
                stacklevel=3,
            )
        return latents.to(weight.dtype), text.to(weight.dtype)

    def _rotary(
        self, grid: Grid, text_len: int, given: tuple[Tensor, Tensor] | None, device: torch.device
    ) -> Rotary | None:
        if given is None and not self.config.use_rotary_positional_embeddings:
            return None
        if given is None:
            return self._held(
                ("rotary", grid, text_len, device),
                lambda: join_rotary(*rotary_tables(self.config, grid, device), text_len),
            )
        expected = (math.prod(grid), self.config.attention_head_dim)
        if len(given) != 2:
            raise ValueError(f"image_rotary_emb has {len(given)} parts, expected two: (cos, sin)")
        for table in given:
            if tuple(table.shape) != expected:
                raise ValueError(
                    f"image_rotary_emb has a table of shape {tuple(table.shape)}, expected {expected}: one row for "
                    f"each of the {' × '.join(map(str, grid))} patches, one column for each channel of a head"
                )
        cos, sin = given
        return join_rotary(cos.to(device), sin.to(device), text_len)

    def _positions(
        self, latents_shape: torch.Size, grid: Grid, text_len: int, device: torch.device, dtype: torch.dtype
    ) -> Tensor | None:
        config = self._config
        if config.use_rotary_positional_embeddings and not config.use_learned_positional_embeddings:
            return None
        if text_len > config.max_text_seq_length:
            raise ValueError(
                f"encoder_hidden_states has {text_len} text tokens, at most {config.max_text_seq_length} have positions"
            )
        if config.use_learned_positional_embeddings:
            if tuple(latents_shape[3:]) != (config.sample_height, config.sample_width):
                raise ValueError(
                    f"latents are {latents_shape[3]} × {latents_shape[4]}, but the learned positions of this model are "
                    f"for {config.sample_height} × {config.sample_width} only: generate at that size"
                )
            if (latents_shape[1] - 1) * config.temporal_compression_ratio + 1 == config.sample_frames:
                learned: Tensor = self.patch_embed.pos_embedding  # type: ignore[assignment]  # a buffer
                if text_len == config.max_text_seq_length:
                    return learned
                return torch.cat([learned[:, :text_len], learned[:, config.max_text_seq_length :]], dim=1)
        return self._held(  # as upstream: sin-cos ones also where the learned ones have another length
            ("sincos", grid, text_len, device, dtype),
            lambda: torch.nn.functional.pad(sincos_table(config, grid, device).to(dtype), (0, 0, text_len, 0))[None],
        )

    def _mask(self, attention_kwargs: Mapping[str, Any] | None, batch: int, tokens: int, device: torch.device) -> Mask:
        kwargs = dict(attention_kwargs or {})
        kwargs.pop("scale", None)
        mask = kwargs.pop("attention_mask", None)
        if kwargs:
            warnings.warn(
                f"attention_kwargs {sorted(kwargs)} are not known and ignored; known are 'attention_mask' and 'scale'",
                stacklevel=3,
            )
        if mask is not None and self._plan is not None:
            raise ValueError("an attention_mask is given, but an attention plan is set, which is a mask: leave one out")
        if mask is None:
            takes_block_mask = any(BACKENDS[name].masks not in (None, Tensor) for name in self.attention_backends)
            return self._held(("mask", device), lambda: full_block_mask(device)) if takes_block_mask else None
        return _joint_mask(mask, batch, self.config.num_attention_heads, tokens)

    def _planned(self, grid: Grid, text_len: int, device: torch.device) -> GridPlan | None:
        if (plan := self._plan) is None:
            return None
        return self._held(("plan", grid, text_len, device), lambda: plan.on_grid(grid, text_len, device))

    def _held(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """A table made once for each key; the oldest of more than a few are dropped."""
        if torch.compiler.is_compiling():  # under the caller's own torch.compile a table is part of the graph
            return make()
        table = self._tables.pop(key, None)  # two threads may make it twice, which is no harm
        if table is None:
            with torch.inference_mode(False):  # made under inference mode it could not be trained with later
                table = make()
        while len(self._tables) >= _TABLES_HELD:
            with contextlib.suppress(KeyError):
                self._tables.popitem(last=False)
        self._tables[key] = table
        return table


def _joint_mask(mask: Any, batch: int, num_heads: int, tokens: int) -> Tensor:
    """An ``attention_mask`` of any of upstream's shapes as one that broadcasts to (B, N, S, S)."""
    expected = (
        f"expected a boolean or floating tensor of shape (B, S), (B, S, S) or (B · N, S, S) with B = {batch}, "
        f"N = {num_heads}, S = {tokens} (text, then video tokens)"
    )
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise ValueError(f"attention_mask is a {getattr(mask, 'dtype', type(mask).__name__)}, {expected}")
    shape = tuple(mask.shape)
    if mask.dim() == 2:
        mask = mask[:, None, None]
    elif mask.dim() == 3 and shape[0] == batch * num_heads:
        mask = mask.unflatten(0, (batch, num_heads))
    elif mask.dim() == 3:
        mask = mask[:, None]
    sizes = ((batch,), (1, num_heads), (1, tokens), (tokens,))
    if mask.dim() != 4 or any(size not in allowed for size, allowed in zip(mask.shape, sizes, strict=True)):
        raise ValueError(f"attention_mask has shape {shape}, {expected}")
    return mask


def per_video(name: str, value: Any, batch: int, device: torch.device) -> Tensor:
    """A number, ``(1,)`` or ``(B,)`` as ``(B,)``."""
    tensor = torch.as_tensor(value, device=device)
    if tensor.dim() > 1 or tensor.numel() not in (1, batch):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected a number, (1,) or (batch {batch},)")
    return tensor.reshape(-1).expand(batch)


__all__ = ["InputPreparation", "per_video"]
