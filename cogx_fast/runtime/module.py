"""The module users hold: diffusers' call signature outside, the traced transformer inside."""

from __future__ import annotations

import math
import os
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from cogx_fast.config import TransformerConfig
from cogx_fast.model.attention import Mask, Rotary
from cogx_fast.model.backends import BACKENDS, Backend, ready_backend
from cogx_fast.model.masks import SparseBlocks, full_block_mask
from cogx_fast.model.tables import Grid, join_rotary, rotary_tables, sincos_table
from cogx_fast.model.transformer import Attention, Block, CogVideoXTransformer
from cogx_fast.runtime.choice import Choice
from cogx_fast.runtime.plan import AttentionPlan, GridPlan
from cogx_fast.runtime.quantized import follow_dtype

if TYPE_CHECKING:
    from cogx_fast.runtime.explain import Explanation

_TABLES_HELD = 8
_UPSTREAM_PROCESSORS = ("CogVideoXAttnProcessor2_0", "FusedCogVideoXAttnProcessor2_0")


class TransformerOutput(NamedTuple):
    """What the model returns where diffusers is not installed (else its ``Transformer2DModelOutput``)."""

    sample: Tensor


class CogVideoXModel(CogVideoXTransformer):
    """A CogVideoX transformer that is called as diffusers' ``CogVideoXTransformer3DModel`` is.

    It is built with uninitialised or random weights here; ``cogx_fast.load`` gives it real ones.

    Args:
        config: its sizes and options.
        attention: the attention backend, a name from ``cogx_fast.model.backends.BACKENDS``.
    """

    def __init__(self, config: TransformerConfig, *, attention: str = "sdpa") -> None:
        super().__init__(config, attention=attention)
        self._config = config
        self._tables: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
        self._plan: AttentionPlan | None = None
        self._compile_backend: str | None = None  # set by runtime.compile
        self.attention_choice: Choice | None = None
        """What ``load(attention="auto")`` chose, and why."""
        self._compiled: Callable[..., Tensor] | None = None  # set by runtime.compile in place of the traced forward
        self._recorder: Any = None  # what compiling made, where runtime.compile has it noted
        self._compile_config: Any = None  # and how

    @property
    def config(self) -> TransformerConfig:
        """The configuration, readable as an object and as a mapping."""
        return self._config

    @property
    def device(self) -> torch.device:
        """Where the first parameter lies."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model's floating-point parameters (the first one's)."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    def forward(  # type: ignore[override]  # diffusers' signature outside, the core's inside
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor | float,
        timestep_cond: Tensor | None = None,
        ofs: Tensor | float | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        attention_kwargs: Mapping[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Predict the noise (v-prediction) in ``hidden_states``.

        Args:
            hidden_states: noisy latents ``(B, F, C, H, W)``, in latent frames and latent pixels.
            encoder_hidden_states: the text encoder's output ``(B, T, E)``.
            timestep: diffusion timestep, a number, ``(1,)`` or ``(B,)``.
            timestep_cond: must be None: no CogVideoX model has a projection for it (upstream fails on it too).
            ofs: the offset of 1.5 image-to-video, a number, ``(1,)`` or ``(B,)``; ignored by models without one.
            image_rotary_emb: ``(cos, sin)``, each ``(V, K)`` over the video tokens, as the pipelines make them. None
                means the same tables, made once for each size and kept. (Upstream takes None for no rotation at all,
                with which no released model works; identity tables, cos = 1 and sin = 0, give that.)
            attention_kwargs: ``attention_mask`` (``(B, S)``, ``(B, S, S)`` or ``(B · N, S, S)``; boolean, True to
                attend, or added to the scores) and ``scale`` (of LoRA weights; of no effect here).
            return_dict: return an object with ``.sample``, else a tuple of one.

        Returns:
            The prediction ``(B, F, C_out, H, W)``.

        Raises:
            ValueError: shapes that do not fit the configuration or each other; the message says which.
        """
        grid = self._check_inputs(hidden_states, encoder_hidden_states, timestep_cond, ofs)
        batch, text_len = encoder_hidden_states.shape[:2]
        device, dtype = hidden_states.device, hidden_states.dtype
        denoise = self._compiled or super().forward
        timestep_B = _per_video("timestep", timestep, batch, device)
        rotary = self._rotary(grid, text_len, image_rotary_emb, device)
        position = self._positions(hidden_states.shape, grid, text_len, device, dtype)
        mask: Mask | SparseBlocks = self._mask(attention_kwargs, batch, text_len + math.prod(grid), device)
        plan = self._planned(grid, text_len, device)
        if plan is not None:
            rotary, position = plan.reorder(rotary, position)
            mask = plan.mask(timestep_B)
        sample = denoise(
            hidden_states,
            encoder_hidden_states,
            timestep_B,
            None if self.ofs_embedding is None else _per_video("ofs", ofs, batch, device),
            rotary,
            position,
            mask,
        )
        return self._output(sample) if return_dict else (sample,)

    def _output(self, sample: Tensor) -> Any:
        return TransformerOutput(sample)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CogVideoXModel:
        super()._apply(fn, recurse)
        follow_dtype(self, fn)
        return self

    # -- inputs -------------------------------------------------------------------------------------------------------

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
        config = self.config
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
        if key not in self._tables:
            while len(self._tables) >= _TABLES_HELD:
                self._tables.popitem(last=False)
            with torch.inference_mode(False):  # made under inference mode it could not be trained with later
                self._tables[key] = make()
        self._tables.move_to_end(key)
        return self._tables[key]

    # -- what else diffusers' model answers ----------------------------------------------------------------------------

    @contextmanager
    def cache_context(self, name: str, **_: Any) -> Any:
        """Pipelines enter it around each call; this model keeps nothing between calls, so it does nothing."""
        yield

    @property
    def attention_backends(self) -> dict[str, None]:
        """Names of the attention backends in use, usually one."""
        return dict.fromkeys(attention.backend for attention in self._attentions())

    @property
    def attn_processors(self) -> dict[str, Backend]:
        """The attention backend of each layer, under the names that diffusers gives its processors."""
        return {
            f"transformer_blocks.{index}.attn1.processor": BACKENDS[attention.backend]
            for index, attention in enumerate(self._attentions())
        }

    def set_attn_processor(self, processor: Any) -> None:
        """Accept diffusers' own CogVideoX processors (what they compute is what is computed here) and our backends.

        Raises:
            ValueError: another processor, which cannot run inside this model.
        """
        processors = list(processor.values()) if isinstance(processor, Mapping) else [processor]
        for chosen in processors:
            if not isinstance(chosen, Backend) and type(chosen).__name__ not in _UPSTREAM_PROCESSORS:
                raise ValueError(
                    f"attention processor {type(chosen).__name__} cannot run in this model: choose a backend with "
                    f"set_attention_backend, one of {', '.join(BACKENDS)}"
                )
        names = {chosen.name for chosen in processors if isinstance(chosen, Backend)}
        if len(names) > 1:
            raise ValueError(f"one attention backend for all layers, got {sorted(names)}")
        if names:
            self.set_attention_backend(names.pop())

    def set_attention_backend(self, backend: str) -> None:
        """Use another attention backend from the next call on (a compiled model compiles again).

        Raises:
            ValueError: there is no backend of that name, or it cannot run here; the message says what to do.
        """
        head_dim = self.config.attention_head_dim
        name = ready_backend(backend, device=self.device, dtype=self.dtype, head_dim=head_dim).name
        for attention in self._attentions():
            attention.backend = name

    @property
    def attention_plan(self) -> AttentionPlan | None:
        """The sparse attention in use, or None."""
        return self._plan

    def set_attention_plan(self, plan: AttentionPlan | None) -> None:
        """Use another attention plan, or none, from the next call on (a compiled model compiles again).

        Raises:
            PlanError: (a ValueError) it is another model's, or the model's attention backend takes no block masks.
        """
        if plan is not None:
            plan.check(self.config, self)
        self._plan = plan
        self._tables.clear()

    def _attentions(self) -> Iterator[Attention]:
        return (cast(Block, block).attn1 for block in self.transformer_blocks)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        save_function: None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        push_to_hub: bool = False,
    ) -> None:
        """Write configuration and weights as diffusers would; unmodified diffusers loads them (``weights.save``).

        Args:
            save_directory: made if it is not there; a checkpoint in it is replaced whole, or not at all.
            is_main_process: False writes nothing: one process of a group writes for all.
            save_function: must be None: the files are always written in the safetensors format.
            safe_serialization: must be True.
            variant: the ``<variant>`` in ``diffusion_pytorch_model.<variant>.safetensors``.
            max_shard_size: bytes in a file, a number or e.g. "5GB".
            push_to_hub: must be False.

        Raises:
            CheckpointError: (a ValueError) an argument cannot be, or the weights are not those of the configuration.
        """
        from cogx_fast.weights.errors import CheckpointError
        from cogx_fast.weights.save import save_checkpoint

        if not safe_serialization or save_function is not None:
            raise CheckpointError(
                "safe_serialization=False or a save_function is given, but weights are written as .safetensors only, "
                "since pickles can run any code when they are read: leave both out"
            )
        if push_to_hub:
            raise CheckpointError(
                "push_to_hub=True, but nothing is uploaded from here: save, then use huggingface_hub.upload_folder"
            )
        if is_main_process:
            save_checkpoint(self, save_directory, max_shard_size=max_shard_size, variant=variant)

    def save_compile_cache(self, path: str | os.PathLike[str]) -> None:
        """Write what compiling this model made, for ``load(..., compile_cache=path)`` to start warm from.

        The file is code for whoever loads it. What decides whether it fits is in ``runtime.cache.describe``.

        Args:
            path: the file; replaced if it is there.

        Raises:
            ValueError: the model is not compiled, or was not called yet.
            OSError: it cannot be written.
        """
        from cogx_fast.runtime.cache import save_compile_cache

        save_compile_cache(self, path)

    def explain(self, *sizes: Sequence[int], **options: Any) -> Explanation:
        """Say what this model becomes when it is compiled: graphs, breaks, recompiles, kernels, seconds.

        Args:
            sizes: (videos in a call, frames, height, width) in pixels; none means the model's own video for two.
            options: of ``runtime.explain.explain``, which says the rest.
        """
        from cogx_fast.runtime.explain import explain

        return explain(self, *sizes, **options)

    def fuse_qkv_projections(self) -> None:
        """Nothing to do: query, key and value are one projection from the start."""

    def unfuse_qkv_projections(self) -> None:
        """Nothing to undo: the fused projection computes what three apart would."""

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: Any = None) -> None:
        """Keep only each block's input for the backward pass and compute the rest again.

        Raises:
            ValueError: a checkpointing function of the caller's own is given; torch's (non-reentrant) one is used.
        """
        if gradient_checkpointing_func is not None:
            raise ValueError("gradient_checkpointing_func is given: pass None; torch.utils.checkpoint is used")
        self.gradient_checkpointing = True

    def disable_gradient_checkpointing(self) -> None:
        """Keep every activation for the backward pass again."""
        self.gradient_checkpointing = False


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


def _per_video(name: str, value: Any, batch: int, device: torch.device) -> Tensor:
    tensor = torch.as_tensor(value, device=device)
    if tensor.dim() > 1 or tensor.numel() not in (1, batch):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected a number, (1,) or (batch {batch},)")
    return tensor.reshape(-1).expand(batch)


__all__ = ["CogVideoXModel", "TransformerOutput"]
