"""This package's transformer against diffusers' on the same work, on this machine, with random weights."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from cogx_fast.config import TransformerConfig
from cogx_fast.extras import require
from cogx_fast.loading import load
from cogx_fast.measure import timing
from cogx_fast.measure.dtypes import default_dtype
from cogx_fast.model.tables import rotary_tables
from cogx_fast.runtime.compiling.compile import CompileConfig
from cogx_fast.sizes import Tokens
from cogx_fast.terminal import Progress

OURS, PEER = "cogx_fast", "diffusers"
_WARM_UP = 2


@dataclass(frozen=True, kw_only=True)
class Work:
    """A denoising step, and how it is run. What is timed does not depend on the weights."""

    config: TransformerConfig
    tokens: Tokens
    """Of one video."""
    batch: int = 2
    dtype: torch.dtype = torch.bfloat16
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    compile: bool | CompileConfig = False
    """Of ours."""
    attention: str = "auto"
    quant: str | None = None
    peer_compile: Literal["model", "blocks"] | None = None
    """What of diffusers' is compiled by ``torch.compile(..., fullgraph=True)``: all of it, or each of its blocks."""


class Contest:
    """Both transformers, built, compiled and ready to be timed.

    Args:
        work: what they do.
        progress: where to say what is going on.
    """

    def __init__(self, work: Work, progress: Progress | None = None) -> None:
        progress = progress or Progress()
        self.work = work
        arguments = call_arguments(work.config, work.tokens, work.batch, work.dtype, work.device)
        progress.stage("building both transformers")
        quant: dict[str, Any] = {} if work.quant is None else {"quant": work.quant}
        ours = load(random_upstream(work), compile=work.compile, attention=work.attention, **quant)
        peer = random_upstream(work)
        if work.peer_compile == "model":
            peer = torch.compile(peer, fullgraph=True)
        elif work.peer_compile == "blocks":
            for block in peer.transformer_blocks:
                block.compile(fullgraph=True)
        self.steps: dict[str, Callable[[], Tensor]] = {
            OURS: lambda: run(ours, arguments),
            PEER: lambda: run(peer, arguments),
        }
        self._now = timing.clock(work.device)
        self.first_call: dict[str, float] = {}
        """Seconds of the first call of each, compiling in it."""
        for name, step in self.steps.items():
            progress.stage(f"{name}: the first call")
            begin = self._now()
            noise = step()
            self.first_call[name] = self._now() - begin
            if not noise.isfinite().all():
                raise ValueError(f"{name} predicts infinities or NaN in {work.dtype}: choose another dtype")
        timing.take_turns(self.steps, rounds=_WARM_UP, now=self._now)

    def run(self, rounds: int, progress: Progress | None = None) -> dict[str, list[float]]:
        """Seconds of each, by round, in turns."""
        shown = (progress or Progress()).steps("timing in turns", rounds)
        return timing.take_turns(self.steps, rounds=rounds, now=self._now, on_round=shown)


def run(model: Any, arguments: Mapping[str, Any]) -> Tensor:
    """One denoising step."""
    with torch.no_grad():
        noise: Tensor = model(**arguments, return_dict=False)[0]
    return noise


def random_upstream(work: Work) -> Any:
    """A transformer of diffusers' with random weights, the same every time, made on its device at once."""
    upstream = require("diffusers", why="to be compared with").CogVideoXTransformer3DModel
    with torch.random.fork_rng(), torch.device(work.device), default_dtype(work.dtype):
        torch.manual_seed(0)
        return upstream(**work.config).eval().requires_grad_(False)


def call_arguments(
    config: TransformerConfig, tokens: Tokens, batch: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Random arguments of one call, as the pipelines give them to either transformer."""
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    frames, height, width = tokens.grid
    p, p_t = config.patch_size, config.patch_size_t or 1
    arguments: dict[str, Any] = {
        "hidden_states": randn(batch, frames * p_t, config.in_channels, height * p, width * p),
        "encoder_hidden_states": randn(batch, tokens.text, config.text_embed_dim),
        "timestep": torch.full((batch,), 500, device=device),
    }
    if config.use_rotary_positional_embeddings:
        arguments["image_rotary_emb"] = rotary_tables(config, tokens.grid, device)
    if config.ofs_embed_dim is not None:
        arguments["ofs"] = torch.full((1,), 2.0, device=device, dtype=dtype)
    return arguments


def machine(device: torch.device) -> dict[str, str]:
    """What the times depend on besides the code: device and versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    versions = {name: _version(name) for name in ("diffusers", "torchao", "triton")}
    return {"device": name, "torch": torch.__version__, **versions, "python": platform.python_version()}


def _processor() -> str:
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


__all__ = ["OURS", "PEER", "Contest", "Work", "call_arguments", "machine", "random_upstream", "run"]
