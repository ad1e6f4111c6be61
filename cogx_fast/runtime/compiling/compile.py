"""Compilation: how a model is compiled. No flag of torch is set globally."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from cogx_fast.model.products import is_int8_dynamic
from cogx_fast.runtime import composition
from cogx_fast.runtime.attached import Watch
from cogx_fast.runtime.compiling.calls import Calls
from cogx_fast.runtime.compiling.compiled import CompiledRunner, WholeRunner, check_graphs
from cogx_fast.runtime.compiling.recompiles import CompilationStats, RecompileError, RecompileWarning, watch_compilation
from cogx_fast.runtime.compiling.symbols import Symbols
from cogx_fast.runtime.compiling.torch_cache import CacheDirectory
from cogx_fast.runtime.runner import Runner

if TYPE_CHECKING:
    from cogx_fast.runtime.compiling.recorder import Recorder
    from cogx_fast.runtime.module import CogVideoXModel

MODES = ("default", "reduce-overhead", "max-autotune-no-cudagraphs", "max-autotune")


@dataclass(frozen=True, kw_only=True)
class CompileConfig:
    """How a model is compiled. Always as one graph: a graph break is an error, never a silent slow-down.

    Raises:
        ValueError: an unknown scope or mode, or options that do not go together.
    """

    scope: Literal["block", "model"] = "block"
    """``block``: the block is compiled once and used for every layer; what stands before and after the blocks is two
    graphs more (with gradients it runs as it is). ``model``: the whole forward is one graph, in which the block is a
    region that is compiled once (quantized blocks, which torch's regions do not take: once for each layer)."""
    mode: str | None = None
    """One of torch.compile's modes; None is ``max-autotune-no-cudagraphs`` on CUDA and ``default`` elsewhere.
    ``reduce-overhead`` and ``max-autotune`` record CUDA graphs, for which the scope must be ``model``."""
    dynamic: bool = True
    """True: sizes are symbolic from the start, so one graph holds for all. False: each size is compiled apart."""
    strict: bool = False
    """A recompile is a ``RecompileError``; otherwise a ``RecompileWarning`` says which input caused it."""
    unrolled: bool = False
    """With the scope ``model``: every layer is compiled on its own into the graph, so that the last addition of a block
    joins the next one's norm; compile time grows with the layers."""
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
        if self.unrolled and self.scope != "model":
            raise ValueError("unrolled=True is for the whole model: use scope='model', or leave it out")
        if self.cuda_graphs and self.scope == "block":
            raise ValueError(
                f"{self.mode or 'triton.cudagraphs'} records CUDA graphs, of which scope 'block' would make one for "
                "every layer, each with copies of its inputs: use scope='model', or mode='max-autotune-no-cudagraphs'"
            )

    @property
    def cuda_graphs(self) -> bool:
        """Whether calls on CUDA are recorded and replayed."""
        return bool(self.options.get("triton.cudagraphs", self.mode in ("reduce-overhead", "max-autotune")))


class Compilation(NamedTuple):
    """How a model is compiled, and what that made."""

    config: CompileConfig
    recorder: Recorder | None
    """Where Inductor compiles."""


def compile_model(
    model: CogVideoXModel, config: CompileConfig, *, compiler: Callable[..., Any] = torch.compile
) -> None:
    """Make ``model`` run compiled from its next call on, which compiles. Again with another config replaces the first.

    Args:
        model: changed in place; its modules, names and weights stay as they are. Quantize it first.
        config: scope and options.
        compiler: in ``torch.compile``'s place, to watch it (``measure.explain``).

    Raises:
        PlanError: (a ValueError) the model has an attention plan, which that backend would ignore.
        AttachedError: (a ValueError) something on the model cannot be compiled.
        ValueError: the model runs a package.
    """
    model.runner.refuse_packaged("the model cannot be compiled")
    slots = model.runner.slots.eagerly()
    attention = composition.of_attention((), has_plan=model.attention_plan is not None)
    composition.check({**attention, **composition.of_slots(slots), **composition.of_compile(config)})
    directory = CacheDirectory()
    with directory.used():
        recorder = None
        if config.backend == "inductor":
            from cogx_fast.runtime.compiling.recorder import Recorder

            int8 = any(map(is_int8_dynamic, model.modules()))
            recorder = Recorder(config, functools.partial(inductor_options, config, int8=int8))
        compile = functools.partial(
            compiler,
            fullgraph=True,
            dynamic=None if config.dynamic else False,  # which sizes are symbolic is marked on the inputs
            backend=recorder or config.backend,
        )
        whole = config.scope == "model"
        if whole:
            check_graphs(slots)
        runner: type[CompiledRunner] = WholeRunner if whole else CompiledRunner
        model.runner = runner(
            slots,
            model,
            compilation=Compilation(config, recorder),
            compile=compile,
            symbols=Symbols(
                dynamic=config.dynamic,
                cuda_graphs=config.cuda_graphs,
            ),
            calls=Calls(
                "the model" if whole else "the block",
                dynamic=config.dynamic,
                strict=config.strict,
                inductor=recorder is not None,
                directory=directory,
            ),
        )
    model._attached = Watch()  # to look at it anew


def uncompile_model(model: CogVideoXModel) -> None:
    """Make ``model`` run eagerly again.

    Raises:
        ValueError: it runs a package.
    """
    model.runner.refuse_packaged("the model cannot run eagerly")
    model.runner = Runner(model.runner.slots.eagerly())


INT8_OPTIONS: Mapping[str, Any] = {"epilogue_fusion_first": True}
"""Where int8 products on CUDA are timed (``candidates``): a product's scaling joins it before anything else does."""


def inductor_options(config: CompileConfig, device: torch.device, *, int8: bool = False) -> dict[str, Any]:
    """Inductor's options on a device; ``int8``: for a model with dynamic products of int8."""
    from torch._inductor import list_mode_options

    mode = config.mode or ("max-autotune-no-cudagraphs" if device.type == "cuda" else "default")
    is_scaled = int8 and device.type == "cuda" and mode.startswith("max-autotune")
    repair = _repair() if config.scope == "model" and device.type == "cuda" else {}
    return {**list_mode_options(mode), **(INT8_OPTIONS if is_scaled else {}), **repair, **config.options}


def _repair() -> dict[str, Any]:
    """What torch needs for rows that are a sum of sizes: ``KeepSplitLoops`` in 2.13; in 2.11 no analysis of tiling,
    which takes B · (T + V) for another number than B · T + B · V and fails where gradients are wanted."""
    import torch._inductor.custom_graph_pass as passes

    if not hasattr(passes, "CustomSchedulerPass"):
        return {"triton.coalesce_tiling_analysis": False}
    from cogx_fast.runtime.compiling.merged_loops import KeepSplitLoops

    return {"_post_fusion_custom_pass": KeepSplitLoops()}


__all__ = [
    "MODES",
    "Compilation",
    "CompilationStats",
    "CompileConfig",
    "RecompileError",
    "RecompileWarning",
    "compile_model",
    "inductor_options",
    "uncompile_model",
    "watch_compilation",
]
