"""Our model as one of diffusers' own, where that is wanted: importing this module does not import diffusers."""

from __future__ import annotations

import importlib.util
import sys

from cogx_fast.runtime.module import CogVideoXModel


def model_class(for_pipelines: bool | None = True) -> type[CogVideoXModel]:
    """The class that ``load`` builds; None: that for pipelines if diffusers is imported already."""
    if for_pipelines is None:
        for_pipelines = "diffusers" in sys.modules
    if not for_pipelines or importlib.util.find_spec("diffusers") is None:
        return CogVideoXModel
    from cogx_fast.runtime.for_diffusers.diffusers_model import CogVideoXTransformer3DModel

    return CogVideoXTransformer3DModel


__all__ = ["model_class"]
