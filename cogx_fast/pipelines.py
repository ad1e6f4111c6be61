"""The bridge to diffusers' pipelines."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from cogx_fast.config import UPSTREAM_CLASS
from cogx_fast.loading import load

Pipeline = TypeVar("Pipeline")


def accelerate(pipe: Pipeline, **options: Any) -> Pipeline:
    """Give a diffusers CogVideoX pipeline this package's transformer in place of its own.

    Weights are shared with the transformer that was there, or moved, not doubled (see ``cogx_fast.load``). CPU offload
    that was enabled stays enabled.

    Args:
        pipe: a ``CogVideoXPipeline``, ``…ImageToVideoPipeline``, ``…VideoToVideoPipeline`` or
            ``CogVideoXFunControlPipeline``; changed in place.
        **options: as for ``cogx_fast.load``: ``dtype``, ``device``, ``attention``, ``compile``.

    Returns:
        The same pipeline.

    Raises:
        ValueError: it has no CogVideoX transformer, or one with hooks or adapters whose work would be lost.
    """
    transformer: Any = getattr(pipe, "transformer", None)
    if not isinstance(transformer, nn.Module):
        raise ValueError(
            f"{type(pipe).__name__} has no transformer (got {transformer!r}), expected {UPSTREAM_CLASS}: pass a "
            "diffusers CogVideoX pipeline"
        )
    _refuse_hooks(transformer)
    offload = _remove_cpu_offload(pipe)
    try:
        pipe.transformer = load(transformer, **options)  # type: ignore[attr-defined]
    finally:
        if offload is not None:
            offload()
    return pipe


def _refuse_hooks(transformer: Any) -> None:
    hooks = {
        name
        for module in transformer.modules()
        for name in getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
    }
    if hooks:
        raise ValueError(
            f"the pipeline's transformer has diffusers hooks ({', '.join(sorted(hooks))}), which cannot move to "
            "another model: call accelerate before enabling caching, layerwise casting or group offloading"
        )


def _remove_cpu_offload(pipe: Any) -> Callable[[], None] | None:
    """Undo accelerate's offload hooks; returns what puts them back, or None where there were none."""
    if not any(hasattr(module, "_hf_hook") for module in pipe.transformer.modules()):
        return None
    whole_models = bool(getattr(pipe, "_all_hooks", None))  # else module by module: "sequential"
    enable = pipe.enable_model_cpu_offload if whole_models else pipe.enable_sequential_cpu_offload
    pipe.remove_all_hooks()
    return functools.partial(enable, device=getattr(pipe, "_offload_device", "cuda"))


__all__ = ["accelerate"]
