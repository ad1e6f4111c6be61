"""What the server that forks the cases' processes (``pool.start_method``) has imported and traced once for all."""

from __future__ import annotations

import torch
import torchao.quantization  # noqa: F401
from diffusers import CogVideoXTransformer3DModel  # noqa: F401

import benchmarks.gpu.worker  # noqa: F401
import cogx_fast  # noqa: F401

torch.compile(lambda x: x + 1, fullgraph=True, backend="aot_eager")(torch.zeros(2))
torch.compiler.reset()
