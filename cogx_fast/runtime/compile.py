"""Compilation: the only owner of torch._dynamo and torch._inductor. No flag is set globally."""

from __future__ import annotations

import functools
import itertools
import time
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from cogx_fast.model.products import is_int8_dynamic
from cogx_fast.model.transformer import Block, CogVideoXTransformer
from cogx_fast.runtime.cache import Recorder
from cogx_fast.runtime.module import CogVideoXModel

MODES = ("default", "reduce-overhead", "max-autotune-no-cudagraphs", "max-autotune")

_serial = itertools.count()


@dataclass(frozen=True, kw_only=True)
class CompileConfig:
    """How a model is compiled. Always as one graph: a graph break is an error, never a silent slow-down.

    Raises:
        ValueError: an unknown scope or mode.
    """

    scope: Literal["block", "model"] = "block"
    """``block``: the block is compiled once and used for every layer; embedding and head run as they are. ``model``:
    the whole forward is one graph; compile time grows with the layers."""
    mode: str | None = None
    """One of torch.compile's modes; None is ``max-autotune-no-cudagraphs`` on CUDA and ``default`` elsewhere."""
    dynamic: bool | None = None
    """None: sizes are fixed at first and become symbolic when they change; True: symbolic at once; False: fixed."""
    backend: str = "inductor"
    """The torch.compile backend; others than ``inductor`` take no mode or options."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Inductor options for this model alone, over those of the mode."""

    def __post_init__(self) -> None:
        if self.scope not in ("block", "model"):
            raise ValueError(f"scope is {self.scope!r}, expected 'block' or 'model'")
        if self.mode is not None and self.mode not in MODES:
            raise ValueError(f"mode is {self.mode!r}, expected None or one of {', '.join(MODES)}")
        if self.backend != "inductor" and (self.mode or self.options):
            raise ValueError(f"backend {self.backend!r} takes no mode or options: leave them out or use 'inductor'")


def compile_model(
    model: CogVideoXModel, config: CompileConfig, *, compiler: Callable[..., Any] = torch.compile
) -> None:
    """Make ``model`` run compiled from its next call on, which compiles. Again with another config replaces the first.

    Args:
        model: changed in place; its modules, names and weights stay as they are.
        config: scope and options.
        compiler: in ``torch.compile``'s place, to watch it (``runtime.explain``).

    Raises:
        PlanError: (a ValueError) the model has an attention plan, which that backend would ignore.
    """
    uncompile_model(model)
    if model.attention_plan is not None:
        model.attention_plan.check_compiler(config.backend)
    model._compile_config, model._compile_backend = config, config.backend
    if config.backend == "inductor":
        int8 = any(map(is_int8_dynamic, model.modules()))
        model._recorder = Recorder(config, _inductor_options(config, model.device, int8=int8))
    backend = model._recorder or config.backend
    compiled = functools.partial(compiler, fullgraph=True, dynamic=config.dynamic, backend=backend)
    if config.scope == "model":
        model._compiled = functools.partial(compiled(_own(CogVideoXTransformer.forward)), model)
    else:
        forward = compiled(_own(Block.forward))
        for block in model.transformer_blocks:
            block.forward = functools.partial(forward, block)


def uncompile_model(model: CogVideoXModel) -> None:
    """Make ``model`` run eagerly again."""
    model._compiled = model._recorder = model._compile_backend = model._compile_config = None
    for block in model.transformer_blocks:
        block.__dict__.pop("forward", None)


def _own(function: types.FunctionType | Callable[..., Any]) -> Callable[..., Any]:
    """The same function with a code object and a name of its own.

    Dynamo keeps what it compiled and counts recompiles by code object, and remembers which sizes changed by the
    function's name: so each model has its own, and none starts with the limits or sizes of another of the process.
    """
    assert isinstance(function, types.FunctionType)
    name = f"{function.__name__}_{next(_serial)}"
    code = function.__code__.replace(co_name=name)
    copy = types.FunctionType(code, function.__globals__, name, None, function.__closure__)
    copy.__kwdefaults__, copy.__defaults__ = function.__kwdefaults__, function.__defaults__
    return copy


INT8_OPTIONS: Mapping[str, Any] = {"max_autotune_gemm_backends": "TRITON", "epilogue_fusion_first": True}
"""For int8 products on CUDA, where a mode times the candidates: Triton's, which scale the int32 sums before they store
them; a library's writes them out, four bytes each, for another kernel to scale."""


def _inductor_options(config: CompileConfig, device: torch.device, *, int8: bool = False) -> dict[str, Any]:
    from torch._inductor import list_mode_options

    mode = config.mode or ("max-autotune-no-cudagraphs" if device.type == "cuda" else "default")
    is_scaled = int8 and device.type == "cuda" and mode.startswith("max-autotune")
    return {**list_mode_options(mode), **(INT8_OPTIONS if is_scaled else {}), **config.options}


@dataclass
class CompilationStats:
    """What torch compiled while it was watched."""

    graphs: int = 0
    """Graphs captured, first ones and recompiled ones."""
    breaks: int = 0
    """Graph breaks."""
    recompiles: int = 0
    """Compilations of code that had been compiled before, for other inputs."""
    seconds: float = 0.0
    """Wall-clock seconds spent compiling."""


@contextmanager
def watch_compilation() -> Iterator[CompilationStats]:
    """Count what torch compiles inside the ``with`` block, in this process; the numbers are there when it ends."""
    from torch._dynamo.callback import CallbackArgs, callback_handler
    from torch._dynamo.utils import counters

    stats = CompilationStats()
    started: list[float] = []
    graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())

    def start(args: CallbackArgs) -> None:
        started.append(time.perf_counter())
        frame_compile_id = args.compile_id.rsplit("/", 1)[-1].split("_")[0]
        stats.recompiles += frame_compile_id.isdigit() and int(frame_compile_id) > 0

    def end(args: CallbackArgs) -> None:
        stats.seconds += time.perf_counter() - started.pop()

    callback_handler.register_start_callback(start)
    callback_handler.register_end_callback(end)
    try:
        yield stats
    finally:
        callback_handler.remove_start_callback(start)
        callback_handler.remove_end_callback(end)
        stats.graphs = counters["stats"]["unique_graphs"] - graphs
        stats.breaks = sum(counters["graph_break"].values()) - breaks


__all__ = ["MODES", "CompilationStats", "CompileConfig", "compile_model", "uncompile_model", "watch_compilation"]
