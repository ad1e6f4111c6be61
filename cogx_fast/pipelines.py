"""The bridge to diffusers: our model as one of its models, and the call that takes a whole pipeline."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeVar

from torch import Tensor, nn

from cogx_fast.config import UPSTREAM_CLASS, TransformerConfig
from cogx_fast.runtime.module import CogVideoXModel

Pipeline = TypeVar("Pipeline")


@functools.cache
def model_class() -> type[CogVideoXModel]:
    """The class that ``load`` builds: with diffusers installed, one that its pipelines take for their own transformer.

    It derives from diffusers' ``CogVideoXTransformer3DModel`` because ``from_pretrained(transformer=...)`` asks for a
    ``ModelMixin`` and warns of anything but that class; it shares none of its forward, weights' layout or files.
    """
    if importlib.util.find_spec("diffusers") is None:
        return CogVideoXModel
    from diffusers import CogVideoXTransformer3DModel as Upstream
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    class UpstreamInterface(Upstream):
        """Upstream's class without its construction: what a pipeline may ask of a transformer."""

        def __init__(self) -> None:
            nn.Module.__init__(self)

    class CogVideoXTransformer3DModel(CogVideoXModel, UpstreamInterface):
        """``CogVideoXModel`` as a diffusers model."""

        _no_split_modules: ClassVar = ["Block", "PatchEmbed"]
        _repeated_blocks: ClassVar = ["Block"]

        def __init__(self, config: TransformerConfig, *, attention: str = "sdpa") -> None:
            super().__init__(config, attention=attention)
            # Pipelines write class and module of their parts into model_index.json. On disk this model is upstream's.
            self.__module__ = Upstream.__module__

        def _output(self, sample: Tensor) -> Any:
            return Transformer2DModelOutput(sample=sample)

        @classmethod
        def from_pretrained(
            cls, path: Any, *, subfolder: str | None = None, torch_dtype: Any = None, **options: Any
        ) -> Any:
            """``cogx_fast.load`` under diffusers' name."""
            from cogx_fast.loading import load

            return load(Path(path) / subfolder if subfolder else path, dtype=torch_dtype, **options)

        def enable_cache(self, config: Any) -> NoReturn:
            raise ValueError(
                f"{type(config).__name__} hooks into the separate text and video streams of diffusers' blocks, which "
                "this model does not have: use diffusers' own transformer with it"
            )

        def _no_adapters(self, *_: Any, **__: Any) -> NoReturn:
            raise ValueError(
                "adapters cannot be added to this model, whose projections are fused: load the LoRA into diffusers' "
                "pipeline, call pipe.fuse_lora(), then cogx_fast.accelerate(pipe)"
            )

        load_lora_adapter = add_adapter = set_adapters = _no_adapters

    assert CogVideoXTransformer3DModel.__name__ == UPSTREAM_CLASS
    return CogVideoXTransformer3DModel


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
    from cogx_fast.loading import load

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


__all__ = ["accelerate", "model_class"]
