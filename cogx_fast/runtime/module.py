"""The module users hold: diffusers' call signature outside, the traced transformer inside."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from cogx_fast.attention.backends import BACKENDS
from cogx_fast.config import ConfigError, TransformerConfig
from cogx_fast.model.tracing import is_traced
from cogx_fast.model.transformer import CogVideoXTransformer
from cogx_fast.runtime import composition
from cogx_fast.runtime.attached import Watch, check_own
from cogx_fast.runtime.attention_methods import AttentionMethods
from cogx_fast.runtime.auto_attention import AttentionFor, Choice
from cogx_fast.runtime.baked import BakedSchedule, read_schedule
from cogx_fast.runtime.composition import Feature
from cogx_fast.runtime.distributed.sharded import check_conversion, refuse_moved, refuse_sharded
from cogx_fast.runtime.inputs import Preparation
from cogx_fast.runtime.quantized import follow_dtype
from cogx_fast.runtime.runner import Runner, compute_all
from cogx_fast.runtime.step_caching import step_cache
from cogx_fast.runtime.step_caching.step_cache import StepCache
from cogx_fast.runtime.step_caching.step_schedule import StepSchedule
from cogx_fast.runtime.step_caching.step_schedule_file import choose_strategy
from cogx_fast.runtime.streaming import kept_on_host
from cogx_fast.weights.lora import LoraLike, read_loras
from cogx_fast.weights.merge import Merged

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from cogx_fast.measure.explain import Explanation
    from cogx_fast.runtime.distributed.parallel import ParallelConfig

_OF_THE_VIDEO = ("sample_height", "sample_width", "sample_frames", "max_text_seq_length")
"""Fields that pipelines read for their defaults and that no weight depends on, but for learned positions."""


class TransformerOutput(NamedTuple):
    """What the model returns where diffusers is not installed (else its ``Transformer2DModelOutput``)."""

    sample: Tensor


class CogVideoXModel(AttentionMethods, CogVideoXTransformer):
    """A CogVideoX transformer that is called as diffusers' ``CogVideoXTransformer3DModel`` is.

    It is built with uninitialised or random weights here; ``cogx_fast.load`` gives it real ones.

    Args:
        config: its sizes and options.
        attention: the attention backend, a name from ``cogx_fast.attention.backends.BACKENDS``.
    """

    def __init__(self, config: TransformerConfig, *, attention: str = "sdpa") -> None:
        super().__init__(config, attention=attention)
        self._config = config  # as it was built; ``config`` may say other sizes of the default video since
        self._registered = config
        self.inputs = Preparation(config)
        """What makes a step's inputs of a call's arguments."""
        self.runner = Runner()
        """What runs its steps: eagerly; compiled, by ``compiling.compile``; or a package, by ``packages.package``."""
        self.merged = Merged(config)
        """The LoRAs that the weights hold."""
        self.attention_choice: Choice | None = None
        """What ``load(attention="auto")`` chose, and why."""
        self._attention_for: AttentionFor | None = None
        """What that choice was made for. On another device it is made again, unless a backend was named since."""
        self._attention_is_named = False
        self._attached = Watch()

    @property
    def device(self) -> torch.device:  # type: ignore[override]  # AttentionMethods only reads it
        """Where the first parameter lies."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """The dtype of the model's floating-point parameters (the first one's)."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    @property
    def config(self) -> TransformerConfig:  # type: ignore[override]
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
        self.inputs.use(self._registered)

    def forward(
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
            hidden_states: noisy latents ``(B, F, C, H, W)``, in latent frames and latent pixels. Another dtype than the
                weights' is converted to theirs and back, with a warning (under autocast it is not).
            encoder_hidden_states: the text encoder's output ``(B, T, E)``.
            timestep: diffusion timestep, a number, ``(1,)`` or ``(B,)``.
            timestep_cond: must be None: no CogVideoX model has a projection for it (upstream fails on it too).
            ofs: the offset of 1.5 image-to-video, a number, ``(1,)`` or ``(B,)``; ignored by models without one.
            image_rotary_emb: ``(cos, sin)``, each ``(V, K)`` over the video tokens, as the pipelines make them. None
                means the same tables, made once for each size and kept. (Upstream takes None for no rotation at all,
                with which no released model works; identity tables, cos = 1 and sin = 0, give that.)
            attention_kwargs: ``attention_mask`` (``(B, S)``, ``(B, S, S)`` or ``(B · N, S, S)``; boolean, True to
                attend, or added to the scores) and ``scale`` (of the adapters that are
                active).
            return_dict: return an object with ``.sample``, else a tuple of one.

        Returns:
            The prediction ``(B, F, C_out, H, W)`` in ``hidden_states``' dtype.

        Raises:
            ValueError: shapes or dtypes that do not fit the configuration or each other, or something attached to the
                model that cannot work here; the message says which.
        """
        if not is_traced() and self._attached.has_changed():
            self.check_attached()
        self._follow_scale(attention_kwargs)
        if timestep_cond is not None:
            raise ValueError("timestep_cond is given, but no CogVideoX model has a projection for it: pass None")
        self._attend_on(hidden_states.device)
        inputs = self.inputs(
            self,
            hidden_states,
            encoder_hidden_states,
            timestep,
            ofs,
            image_rotary_emb,
            attention_kwargs,
            takes_block_masks=any(BACKENDS[name].masks not in (None, Tensor) for name in self.attention_backends),
        )
        sample = self.runner(self, inputs)
        if inputs.latents_BFCHW.dtype != hidden_states.dtype:  # what was converted is converted back
            sample = sample.to(hidden_states.dtype)
        return self._output(sample) if return_dict else (sample,)

    def check_attached(self) -> None:
        """Look at what was attached to the model (hooks, patches, modules); calls do so when there is anything new.

        Raises:
            AttachedError: (a ValueError) something that would do nothing here, or cannot be compiled with the model.
        """
        check_own(self)
        refuse_moved(self)
        self.runner.follow_attached(self)
        self._attached.note(self)

    def _follow_scale(self, attention_kwargs: Mapping[str, Any] | None) -> None:
        """Have adapters be as strong as a call asks for; there are some in diffusers' class alone."""

    def _output(self, sample: Tensor) -> Any:
        return TransformerOutput(sample)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CogVideoXModel:
        check_conversion(self, fn)
        self.merged.look(self)
        with kept_on_host(self, fn):
            super()._apply(fn, recurse)
        follow_dtype(self, fn)
        self.merged.note(self)
        return self

    # -- weights by name -----------------------------------------------------------------------------------------------

    def state_dict(self, *arguments: Any, layout: str | None = None, **options: Any) -> Any:
        """As ``nn.Module.state_dict``.

        Args:
            *arguments, **options: torch's: ``destination``, ``prefix``, ``keep_vars``.
            layout: "diffusers" gives names and shapes of diffusers' model, as views of the same memory; None ours.

        Raises:
            CheckpointError: (a ValueError) the weights are not those of the configuration, e.g. with adapters.
            ValueError: another layout, or ``destination`` with one.
        """
        if layout is None:
            return super().state_dict(*arguments, **options)
        if layout != "diffusers":
            raise ValueError(f"layout is {layout!r}, expected 'diffusers', or None for this model's own names")
        if arguments or options.get("destination") is not None:
            raise ValueError("destination is given with a layout: leave it out, and update it with what is returned")
        refuse_sharded(self, "state_dict(layout='diffusers')", "leave out layout, which gives each rank its shards")
        from cogx_fast.weights.state import in_upstream_names

        own = super().state_dict(keep_vars=options.get("keep_vars", False))
        tensors = in_upstream_names(own, self._config, f"this {type(self).__name__}")
        return {f"{options.get('prefix', '')}{name}": tensor for name, tensor in tensors.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As ``nn.Module.load_state_dict``, for a state dict in this model's names or wholly in diffusers'.

        Raises:
            RuntimeError: names or shapes do not fit; with diffusers' names, before anything is loaded.
            CheckpointError: (a ValueError) diffusers' names, for a quantized model.
        """
        from cogx_fast.weights.state import in_our_names

        translated = in_our_names(self, self._config, state_dict, strict=strict)
        if translated is None:
            return super().load_state_dict(state_dict, strict, assign)
        tensors, missing, unexpected = translated
        keys = super().load_state_dict(tensors, strict=False, assign=assign)
        return type(keys)(missing, unexpected)

    def set_loras(self, loras: Sequence[LoraLike]) -> None:
        """Have the weights hold these LoRAs and no others, in place: nothing compiles again; ``[]`` is the way back.

        What a weight becomes is computed from the weight without LoRAs, to the bit as ``load(loras=…)`` would: it is
        read again from the model's files, or kept in main memory from the first time on.

        Args:
            loras: as of ``load``.

        Raises:
            ShardError: (a ValueError) the weights are sharded.
            LoraError: (a ValueError) a file that cannot be merged, or the weights without LoRAs cannot be restored: the
                model was trained since, or quantized from a live one whose files are not there. Nothing is changed.
            FileNotFoundError: a file is not there.
        """
        refuse_sharded(self, "set_loras", "load it again with loras=...")
        self.merged.exchange(self, read_loras(loras, self._config))

    # -- copies, in this process and in others -------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and pickled: all but the compiled code, which stays with its model; a copy compiles anew.

        Raises:
            ShardError: (a ValueError) its weights are sharded.
        """
        refuse_sharded(self, "a copy", "load the model again")
        self.merged.look(self)
        return {**self.__dict__, "runner": self.runner.for_copy()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.merged.note(self)
        if self.runner.compilation is not None:
            from cogx_fast.runtime.compiling.compile import compile_model

            compile_model(self, self.runner.compilation.config)

    # -- what else diffusers' model answers ----------------------------------------------------------------------------

    @contextmanager
    def cache_context(self, name: str, **_: Any) -> Any:
        """Pipelines enter it around each call: what a step cache keeps under one name is kept apart from others."""
        with step_cache.context(name):
            yield

    def set_step_cache(self, value: StepSchedule | str | os.PathLike[str] | None) -> None:
        """Skip parts of steps (approximate) from the next generation on, or none.

        Args:
            value: as ``load(step_cache=…)``.

        Raises:
            StepCacheError: (a ValueError) it is nothing that can be used, or another model's.
            ValueError: the model is compiled with ``scope="model"``, and it takes more graphs than that has.
        """
        reuse: Any = compute_all if value is None else StepCache(choose_strategy(value, self.config))
        self.runner.use(dataclasses.replace(self.runner.slots, reuse=reuse))

    def set_schedule(self, schedule: Any) -> None:
        """Bake the conditioning of a schedule's timesteps from the next call on (``runtime.baked``), or no more.

        A model that is compiled with ``scope="model"`` compiles again.

        Args:
            schedule: as ``load(schedule=…)``.

        Raises:
            ScheduleError: (a ValueError) it is none.
        """
        self.inputs.baked = None if schedule is None else BakedSchedule(read_schedule(schedule))
        if self.inputs.baked is None:
            self.modulation.to(self.device)
        else:
            self.merged.look(self)
            self.inputs.baked.hold(self)
            self.merged.note(self)

    def set_parallel(self, parallel: ParallelConfig | DeviceMesh | None) -> None:
        """Share each step with the other ranks of a job from the next call on, or not any more; called on all of them.

        Args:
            parallel: as ``load(parallel=…)``.

        Raises:
            ValueError: it does not fit the model, how it runs, or the number of ranks; or there is no job.
        """
        from cogx_fast.runtime.distributed.parallel import parallelize

        if parallel is not None:  # before ranks are joined
            composition.check({**self.runner.features(), **composition.named(Feature.PARALLEL)})
        parallelize(self, parallel)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        save_function: Any = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        push_to_hub: bool = False,
    ) -> None:
        """Write configuration and weights as diffusers would; unmodified diffusers loads them (``weights.save``).

        Args:
            save_directory: made if it is not there; a checkpoint in it is replaced whole, or not at all.
            is_main_process: False writes nothing: one process of a group writes for all.
            save_function: taken and not used, as upstream does.
            safe_serialization: False writes ``.bin`` files by ``torch.save``, which diffusers reads; ``load`` does not,
                since pickles can run any code when they are read.
            variant: the ``<variant>`` in ``diffusion_pytorch_model.<variant>.safetensors``.
            max_shard_size: bytes in a file, a number or e.g. "5GB".
            push_to_hub: must be False.

        Raises:
            CheckpointError: (a ValueError) an argument cannot be, the weights are not those of the configuration, or
                ``.bin`` is asked for with packed int4 weights, which no reader of it could take. Then nothing of the
                model is written; diffusers' pipelines have written their other parts by then.
        """
        from cogx_fast.weights.errors import CheckpointError
        from cogx_fast.weights.save import save_checkpoint

        if push_to_hub:
            raise CheckpointError(
                "push_to_hub=True, but nothing is uploaded from here: save, then use huggingface_hub.upload_folder"
            )
        if is_main_process:
            save_checkpoint(
                self,
                save_directory,
                max_shard_size=max_shard_size,
                variant=variant,
                pickled=not safe_serialization,
            )

    def save_compile_cache(self, path: str | os.PathLike[str]) -> None:
        """Write what compiling this model made, for ``load(..., compile_cache=path)`` to start warm from.

        The file is code for whoever loads it. What decides whether it fits is in ``compiling.warm_start.describe``.

        Args:
            path: the file; replaced if it is there.

        Raises:
            ValueError: the model is not compiled, or was not called yet.
            OSError: it cannot be written.
        """
        from cogx_fast.runtime.compiling.warm_start import save_compile_cache

        save_compile_cache(self, path)

    def explain(self, *sizes: Sequence[int], **options: Any) -> Explanation:
        """Say what this model becomes when it is compiled: graphs, breaks, recompiles, kernels, seconds.

        Args:
            sizes: (videos in a call, frames, height, width) in pixels; none means the model's own video for two.
            options: of ``measure.explain.explain``, which says the rest.
        """
        from cogx_fast.measure.explain import explain

        return explain(self, *sizes, **options)

    def fuse_qkv_projections(self) -> None:
        """Nothing to do: query, key and value are one projection from the start."""

    def unfuse_qkv_projections(self) -> None:
        """Nothing to undo: the fused projection computes what three apart would."""

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: Callable[..., Tensor] | None = None) -> None:
        """Keep only each block's input for the backward pass and compute the rest again.

        Args:
            gradient_checkpointing_func: called as ``f(block, *inputs)`` in place of each block; None is torch's own
                checkpointing, non-reentrant.
        """
        self._gradient_checkpointing_func = gradient_checkpointing_func
        self.gradient_checkpointing = True

    def disable_gradient_checkpointing(self) -> None:
        """Keep every activation for the backward pass again."""
        self.gradient_checkpointing = False


__all__ = ["CogVideoXModel", "TransformerOutput"]
