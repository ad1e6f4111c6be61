"""A fast CogVideoX video transformer that drops into the diffusers pipelines."""

from cogx_fast.config import TransformerConfig
from cogx_fast.loading import load
from cogx_fast.pipelines.accelerate import accelerate
from cogx_fast.runtime.compile import CompileConfig
from cogx_fast.runtime.package import load_package
from cogx_fast.weights.lora import Lora

__version__ = "0.1.0"  # the build reads this line

__all__ = ["CompileConfig", "Lora", "TransformerConfig", "__version__", "accelerate", "load", "load_package"]
