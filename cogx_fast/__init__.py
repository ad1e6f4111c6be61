"""A fast CogVideoX video transformer that drops into the diffusers pipelines."""

from cogx_fast.config import TransformerConfig
from cogx_fast.loading import load, load_package
from cogx_fast.pipelines.accelerate import accelerate
from cogx_fast.runtime.compiling.compile import CompileConfig
from cogx_fast.runtime.distributed.parallel import ParallelConfig
from cogx_fast.version import __version__
from cogx_fast.weights.lora import Lora

__all__ = [
    "CompileConfig", "Lora", "ParallelConfig", "TransformerConfig", "__version__", "accelerate", "load", "load_package",
]  # fmt: skip
