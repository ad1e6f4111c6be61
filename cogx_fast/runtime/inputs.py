"""What a call's arguments become before the traced forward: checked, with tables and masks made once for each size."""

from __future__ import annotations

import contextlib
import math
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cogx_fast.attention.attend import Mask, Rotary
from cogx_fast.attention.masks import SparseBlocks, full_block_mask
from cogx_fast.attention.plan import AttentionPlan
from cogx_fast.config import TransformerConfig
from cogx_fast.model.tables import Grid, join_rotary, rotary_tables, sincos_table
from cogx_fast.model.tracing import is_traced
from cogx_fast.model.transformer import CogVideoXTransformer
from cogx_fast.runtime.baked import BakedSchedule
from cogx_fast.runtime.runner import Inputs

_TABLES_HELD = 8


class _Joined(NamedTuple):
    """What two of the caller's tables became."""

    of: tuple[weakref.ref[Tensor], weakref.ref[Tensor]]
    key: tuple[Any, ...]
    rotary: Rotary


class Preparation:
    """Turns diffusers' arguments into ``Inputs``; keeps the tables of the last few sizes.

    Args:
        config: as the model was built with.
    """

    def __init__(self, config: TransformerConfig) -> None:
        self._built = config
        self._config = config
        self._told_dtypes: set[tuple[torch.dtype, ...]] = set()
        self.tables: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
        """What was made for a size, by what it is and the size."""
        self.plan: AttentionPlan | None = None
        """The sparse attention in use."""
        self.baked: BakedSchedule | None = None
        """What makes the conditioning's tables, where they stand in for the weights."""
        self._joined: _Joined | None = None

    def use(self, config: TransformerConfig) -> None:
        """From now on the default video, whose size tables depend on, is this configuration's."""
        self._config = config
        self.tables.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "tables": OrderedDict(), "_joined": None}  # a copy makes its own

    def __call__(
        self,
        model: CogVideoXTransformer,
        latents: Tensor,
        text: Tensor,
        timestep: Any,
        ofs: Any,
        rotary: tuple[Tensor, Tensor] | None,
        attention_kwargs: Mapping[str, Any] | None,
        *,
        takes_block_masks: bool,
    ) -> Inputs:
        """The arguments of ``CogVideoXModel.forward`` as a step computes with them.

        Args:
            model: whose call it is.
            latents, text, timestep, ofs, rotary, attention_kwargs: the call's.
            takes_block_masks: whether its attention backend does, and so wants one that hides nothing.

        Raises:
            ValueError: something does not fit the configuration or the rest; the message says what.
        """
        grid = self._check(latents, text)
        latents, text = self._in_own_dtype(model, latents, text)
        batch, text_len = text.shape[:2]
        device, dtype = latents.device, latents.dtype
        timestep_B = per_video("timestep", timestep, batch, device)
        ofs_B = None
        if model.ofs_embedding is not None:
            if ofs is None:
                raise ValueError(
                    "ofs is None, but this model (1.5 image-to-video) needs it: pass 2.0, as the pipeline does"
                )
            ofs_B = per_video("ofs", ofs, batch, device)
        joint = self._rotary(grid, text_len, rotary, device)
        position = self._positions(model, latents.shape, grid, text_len, device, dtype)
        mask: Mask | SparseBlocks = self._mask(attention_kwargs, batch, text_len + math.prod(grid), device)
        if mask is None and takes_block_masks:
            mask = self._held(("mask", device), lambda: full_block_mask(device))
        if (plan := self.plan) is not None:
            on_grid = self._held(("plan", grid, text_len, device), lambda: plan.on_grid(grid, text_len, device))
            joint, position = on_grid.reorder(joint, position)
            mask = on_grid.mask(timestep_B)
        table = None
        if self.baked is not None:
            table = self.baked.table(model, timestep, ofs, timestep_B, ofs_B, dtype)
        return Inputs(latents, text, timestep_B, ofs_B, joint, position, mask, table)

    def _check(self, latents: Tensor, text: Tensor) -> Grid:
        config = self._config
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
        return config.grid(latents.shape[1], latents.shape[3], latents.shape[4])

    def _in_own_dtype(self, model: CogVideoXTransformer, latents: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Both in the dtype of the weights, with one warning where that changes them."""
        for name, tensor in (("hidden_states", latents), ("encoder_hidden_states", text)):
            if not tensor.is_floating_point():
                raise ValueError(f"{name} is {tensor.dtype}, expected a floating-point dtype, best the weights' own")
        weight: Any = getattr(model.patch_embed.proj, "weight", None)
        if not isinstance(weight, Tensor) or weight.dtype.itemsize == 1:
            return latents, text
        dtypes = (latents.dtype, text.dtype, weight.dtype)
        if dtypes.count(weight.dtype) == len(dtypes):
            return latents, text
        if not latents.is_meta and torch.is_autocast_enabled(latents.device.type):  # torch knows none for meta
            return latents, text
        if dtypes not in self._told_dtypes and not is_traced():
            self._told_dtypes.add(dtypes)
            given, own = (str(dtype).removeprefix("torch.") for dtype in (dtypes[0], weight.dtype))
            warnings.warn(
                f"hidden_states is {dtypes[0]}, encoder_hidden_states is {dtypes[1]} and the weights are "
                f"{weight.dtype}: the call is computed in {own}. Have all in one dtype: load the model with "
                f"dtype={given!r}, or the pipeline with torch_dtype={weight.dtype}",
                stacklevel=4,
            )
        return latents.to(weight.dtype), text.to(weight.dtype)

    def _rotary(
        self, grid: Grid, text_len: int, given: tuple[Tensor, Tensor] | None, device: torch.device
    ) -> Rotary | None:
        if given is None and not self._config.use_rotary_positional_embeddings:
            return None
        if given is None:
            return self._held(
                ("rotary", grid, text_len, device),
                lambda: join_rotary(*rotary_tables(self._config, grid, device), text_len),
            )
        expected = (math.prod(grid), self._config.attention_head_dim)
        if len(given) != 2:
            raise ValueError(f"image_rotary_emb has {len(given)} parts, expected two: (cos, sin)")
        for table in given:
            if tuple(table.shape) != expected:
                raise ValueError(
                    f"image_rotary_emb has a table of shape {tuple(table.shape)}, expected {expected}: one row for "
                    f"each of the {' × '.join(map(str, grid))} patches, one column for each channel of a head"
                )
        return self._join(*given, text_len, device)

    def _join(self, cos: Tensor, sin: Tensor, text_len: int, device: torch.device) -> Rotary:
        """Tables of the joint stream: pipelines give every step the same two, which are joined once, until they are
        others or were written to."""
        tables = cos, sin
        if is_traced() or any(table.requires_grad or table.is_inference() for table in tables):
            return join_rotary(cos.to(device), sin.to(device), text_len)
        key = *(table._version for table in tables), text_len, device
        joined = self._joined
        if (
            joined is None
            or joined.key != key
            or any(of() is not table for of, table in zip(joined.of, tables, strict=True))
        ):
            with torch.inference_mode(False), torch.no_grad():
                rotary = join_rotary(cos.to(device), sin.to(device), text_len)
            joined = self._joined = _Joined((weakref.ref(cos), weakref.ref(sin)), key, rotary)
        return joined.rotary

    def _positions(
        self,
        model: CogVideoXTransformer,
        latents_shape: torch.Size,
        grid: Grid,
        text_len: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Tensor | None:
        config = self._built
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
                learned: Tensor = model.patch_embed.pos_embedding  # type: ignore[assignment]  # a buffer
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
                stacklevel=4,
            )
        if mask is not None and self.plan is not None:
            raise ValueError("an attention_mask is given, but an attention plan is set, which is a mask: leave one out")
        return None if mask is None else _joint_mask(mask, batch, self._config.num_attention_heads, tokens)

    def _held(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """A table made once for each key; the oldest of more than a few are dropped."""
        if is_traced():  # under the caller's own torch.compile a table is part of the graph
            return make()
        table = self.tables.pop(key, None)  # two threads may make it twice, which is no harm
        if table is None:
            with torch.inference_mode(False):  # made under inference mode it could not be trained with later
                table = make()
        while len(self.tables) >= _TABLES_HELD:
            with contextlib.suppress(KeyError):
                self.tables.popitem(last=False)
        self.tables[key] = table
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


__all__ = ["Preparation", "per_video"]
