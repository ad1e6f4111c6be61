"""The bridge to diffusers' pipelines."""

from __future__ import annotations

import sys
import warnings
from typing import Any, TypeVar

import torch
from torch import nn

from cogx_fast.config import UPSTREAM_CLASS
from cogx_fast.loading import load, read_dtype
from cogx_fast.pipelines.budget import BudgetError, fit, foresee, read_memory
from cogx_fast.pipelines.placement import Placement
from cogx_fast.pipelines.shared_decode import check_decode, share_decode, without_decode
from cogx_fast.runtime.distributed.sharded import is_asked_for
from cogx_fast.runtime.step_caching.step_cache import StepCache
from cogx_fast.runtime.step_caching.step_schedule import Given

Pipeline = TypeVar("Pipeline")
_OWN_REFERENCES = 3
"""To a transformer that is the pipeline's alone: its attribute, the variable here, and the count's own argument."""


def accelerate(pipe: Pipeline, *, memory: int | str | None = None, **options: Any) -> Pipeline:
    """Give a diffusers CogVideoX pipeline this package's transformer in place of its own.

    Weights are shared with the transformer that was there, or moved, not doubled. With ``quant``, each weight of its is
    given up as soon as the quantized one is there, so that little more is needed than before, unless something else
    refers to it (a variable, another pipeline), hooks of accelerate are on it, or ``keep_source=True``. Where
    accelerate placed or offloaded it (``device_map``, ``enable_model_cpu_offload``, ``enable_sequential_cpu_offload``),
    this one is placed in the same way. Adapters must be merged (``pipe.fuse_lora()``). After an error the pipeline is
    as it was, but for a budget that only a smaller recipe than the given file's would keep: that is found afterwards.

    Args:
        pipe: a ``CogVideoXPipeline``, ``…ImageToVideoPipeline``, ``…VideoToVideoPipeline`` or
            ``CogVideoXFunControlPipeline``; changed in place.
        memory: a budget of the GPU's memory, e.g. "12GB". What keeps to it at the model's own video size is chosen
            (which parts are on the GPU when, streamed blocks and a baked schedule, VAE tiling, the text encoder in
            int8, a recipe where ``quant`` is not given) and said on stderr, with the peak predicted for each phase and
            the time (``pipelines.budget``). Of a pipeline without offload.
        **options: as for ``cogx_fast.load``: ``dtype``, ``device``, ``attention``, ``attention_plan``, ``step_cache``,
            ``parallel``, ``compile``, ``compile_cache``, ``quant``, ``loras``, ``offload``, ``schedule``,
            ``keep_source``, ``check_finite``.

    Returns:
        The same pipeline.

    Raises:
        ValueError: it has no CogVideoX transformer, or one with hooks, patches, processors or adapters whose work
            would be lost; the message names them. A budget that cannot be kept (``BudgetError``).
    """
    if memory is not None:
        read_memory(memory)
        if not torch.cuda.is_available():
            raise BudgetError(f"memory={memory!r} is a budget of a GPU's memory, but there is none: leave it out")
        if is_asked_for(options.get("parallel")):
            raise BudgetError(f"memory={memory!r} lays out whole weights, and shard_weights=True shares them: use one")
    transformer: Any = getattr(pipe, "transformer", None)
    if not isinstance(transformer, nn.Module):
        raise ValueError(
            f"{type(pipe).__name__} has no transformer (got {transformer!r}), expected {UPSTREAM_CLASS}: pass a "
            "diffusers CogVideoX pipeline"
        )
    is_shared = sys.getrefcount(transformer) > _OWN_REFERENCES
    transformer = getattr(transformer, "_orig_mod", transformer)  # inside torch.compile's wrapper
    placement = Placement(transformer)
    if options.get("offload") is not None:
        placement.refuse_layers(f"offload={options['offload']!r} streams the blocks itself")
    if is_asked_for(options.get("parallel")):
        placement.refuse_hooks("shard_weights=True places its shares itself")
    if memory is not None:
        placement.refuse_layers("memory=... lays it out itself")
        recipe = foresee(
            pipe, memory, torch.cuda.get_device_name(),
            dtype=None if options.get("dtype") is None else read_dtype(options["dtype"]),
            streams=getattr(options.get("compile"), "scope", "block") == "block",
            is_open="quant" not in options, quant=options.get("quant"),
        )  # fmt: skip
        options.setdefault("quant", recipe)
    options.setdefault("keep_source", is_shared or placement.has_hooks)
    parallel = options.get("parallel")
    check_decode(pipe, parallel)
    options["parallel"] = without_decode(parallel)
    with placement.lifted():
        model = load(transformer, **options)
    placement.give(model)
    model.check_attached()
    pipe.transformer = model  # type: ignore[attr-defined]
    share_decode(pipe, parallel)
    tell_scheduler(pipe)
    placement.hand_over(pipe, model)
    if memory is not None:
        print(fit(pipe, memory, torch.device("cuda", torch.cuda.current_device())), file=sys.stderr)  # noqa: T201
    return pipe


def tell_scheduler(pipe: Any) -> None:
    """Warn where the step schedule of a pipeline's transformer was made with another scheduler than the pipeline's."""
    reuse = pipe.transformer.runner.slots.reuse
    strategy = reuse.strategy if isinstance(reuse, StepCache) else None
    made_with = strategy.given.scheduler if isinstance(strategy, Given) else None
    found = type(getattr(pipe, "scheduler", None)).__name__
    if made_with not in (None, found):
        warnings.warn(
            f"the step schedule was made with {made_with} and the pipeline has {found}: its error is not known there; "
            "find one for this pipeline with cogx-fast tune steps",
            stacklevel=3,
        )


__all__ = ["accelerate", "tell_scheduler"]
