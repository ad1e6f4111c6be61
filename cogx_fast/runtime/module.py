"""The module users hold: diffusers' call signature outside, the traced transformer inside."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from cogx_fast.config import TransformerConfig
from cogx_fast.model.attention import Mask
from cogx_fast.model.backends import BACKENDS, Backend, ready_backend
from cogx_fast.model.masks import SparseBlocks
from cogx_fast.runtime.choice import Choice
from cogx_fast.runtime.inputs import InputPreparation, per_video
from cogx_fast.runtime.plan import AttentionPlan
from cogx_fast.runtime.quantized import follow_dtype

if TYPE_CHECKING:
    from cogx_fast.runtime.explain import Explanation

_UPSTREAM_PROCESSORS = ("CogVideoXAttnProcessor2_0", "FusedCogVideoXAttnProcessor2_0")


class TransformerOutput(NamedTuple):
    """What the model returns where diffusers is not installed (else its ``Transformer2DModelOutput``)."""

    sample: Tensor


class CogVideoXModel(InputPreparation):
    """A CogVideoX transformer that is called as diffusers' ``CogVideoXTransformer3DModel`` is.

    It is built with uninitialised or random weights here; ``cogx_fast.load`` gives it real ones.

    Args:
        config: its sizes and options.
        attention: the attention backend, a name from ``cogx_fast.model.backends.BACKENDS``.
    """

    def __init__(self, config: TransformerConfig, *, attention: str = "sdpa") -> None:
        super().__init__(config, attention=attention)
        self._compile_backend: str | None = None  # set by runtime.compile
        self.attention_choice: Choice | None = None
        """What ``load(attention="auto")`` chose, and why."""
        self._compiled: Callable[..., Tensor] | None = None  # set by runtime.compile in place of the traced forward
        self._recorder: Any = None  # what compiling made, where runtime.compile has it noted
        self._compile_config: Any = None  # and how

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
        timestep_B = per_video("timestep", timestep, batch, device)
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
            None if self.ofs_embedding is None else per_video("ofs", ofs, batch, device),
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

    # -- what else diffusers' model answers ----------------------------------------------------------------------------

    @contextmanager
    def cache_context(self, name: str, **_: Any) -> Any:
        """Pipelines enter it around each call; this model keeps nothing between calls, so it does nothing."""
        yield

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


__all__ = ["CogVideoXModel", "TransformerOutput"]
