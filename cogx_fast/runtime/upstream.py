"""Our model as one of diffusers' own: what its pipelines, which ask for their own classes, take for a transformer."""

from __future__ import annotations

import functools
import importlib.util
import sys
from typing import Any, ClassVar, NoReturn

from torch import Tensor, nn

from cogx_fast.config import UPSTREAM_CLASS, TransformerConfig
from cogx_fast.runtime.module import CogVideoXModel


def model_class(for_pipelines: bool | None = True) -> type[CogVideoXModel]:
    """The class that ``load`` builds; None: that for pipelines if diffusers is imported already."""
    if for_pipelines is None:
        for_pipelines = "diffusers" in sys.modules
    return _pipelines_class() if for_pipelines else CogVideoXModel


@functools.cache
def _pipelines_class() -> type[CogVideoXModel]:
    """With diffusers installed, one that its pipelines take for their own transformer.

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
        def from_pretrained(cls, *_: Any, **__: Any) -> NoReturn:
            raise ValueError("this class does not load itself: call cogx_fast.load(path, dtype=..., device=...)")

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


__all__ = ["model_class"]
