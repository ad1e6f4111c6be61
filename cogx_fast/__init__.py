"""A fast CogVideoX video transformer that drops into the diffusers pipelines."""

from cogx_fast.config import TransformerConfig
from cogx_fast.loading import load

__version__ = "0.1.0"  # the build reads this line

__all__ = ["TransformerConfig", "__version__", "load"]
