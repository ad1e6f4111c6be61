"""``explain``: compile a model that holds no values, at some sizes, and say what came of it."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from cogx_fast.measure.dtypes import default_dtype
from cogx_fast.measure.explain.capture import Capture
from cogx_fast.measure.explain.rehearsal import Rehearsal
from cogx_fast.measure.explain.report import CacheUse, Explanation, Size
from cogx_fast.runtime.step_caching.step_cache import StepCache
from cogx_fast.runtime.tensors import plain_tensors
from cogx_fast.sizes import choose_video, default_video, padded_latent_frames

if TYPE_CHECKING:
    from cogx_fast.config import TransformerConfig
    from cogx_fast.runtime.compiling.compile import CompileConfig
    from cogx_fast.runtime.module import CogVideoXModel


def explain(
    model: CogVideoXModel,
    *sizes: Sequence[int],
    compile: CompileConfig | None = None,
    spatial_factor: int = 8,
    build: bool = True,
    code_of_first_only: bool = False,
) -> Explanation:
    """Say what ``model`` becomes when it is compiled.

    A copy of it that holds no values is compiled, from nothing, in a cache of its own, and never run: so it takes no
    memory for weights and the compile time of a cold start, and leaves the model, its compiled state, torch's flags and
    caches as they are. Its hooks are kept: a graph break, which compiling otherwise refuses, is reported. With a step
    cache it is called once more at the first size for each other kind of step that there may be.

    Args:
        model: any, compiled or not; one whose parameters are fake tensors already is used itself.
        sizes: (videos in a call, frames, height, width) in pixels, called in this order; none means the model's own
            video for two (guidance). More than one shows what recompiles.
        compile: how to compile it; None: as it is compiled, or by default.
        spatial_factor: pixels along a latent pixel's side (the VAE's; 8 in every released model).
        build: compile the generated code to machine code, as a start would, and start a second time to see what the
            cache gives. Without, the seconds lack that phase.
        code_of_first_only: generate code for the first size alone; what recompiles for the others is only captured.

    Returns:
        What was found; ``print`` it for a table.

    Raises:
        ValueError: the model cannot make a video of such a size.
    """
    from torch._inductor.utils import fresh_cache

    from cogx_fast.runtime.compiling.compile import CompileConfig

    compilation = model.runner.compilation
    config = compile or (CompileConfig() if compilation is None else compilation.config)
    calls = _calls(model, _sizes(model, sizes, spatial_factor))
    with fresh_cache():
        cold = Capture(build=build, code_of_first_only=code_of_first_only)
        _compile(model, calls, config, spatial_factor, cold)
        cache = None
        if build:
            warm = Capture(build=True, code_of_first_only=code_of_first_only)
            _compile(model, calls, config, spatial_factor, warm)
            graphs = len(warm.graphs)
            cache = CacheUse(
                hits=graphs - warm.lowered,
                misses=warm.lowered,
                bypassed=warm.bypassed,
                seconds=sum(warm.clock.seconds.values()),
            )
    return Explanation(
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        scope=config.scope,
        mode=config.mode or "",
        attention=", ".join(model.attention_backends),
        sizes=tuple(video for video, _ in calls),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        weights=weight_bytes(model),
        graphs=cold.graphs,
        breaks=tuple(cold.breaks),
        recompiles=tuple(cold.recompiles),
        seconds=dict(cold.clock.seconds),
        cache=cache,
    )


def empty_model(
    config: TransformerConfig, *, attention: str, dtype: torch.dtype, device: torch.device, recipe: str | None = None
) -> CogVideoXModel:
    """A model whose tensors hold no values and take no memory: fake tensors, to compile and not to run.

    Args:
        config: its sizes and options.
        attention: the attention backend.
        dtype: of all weights.
        device: that they are said to be on.
        recipe: a quantization recipe's name or file.

    Raises:
        QuantError: (a ValueError) a recipe that does not fit, or cannot run there.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    from cogx_fast.runtime.module import CogVideoXModel

    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(device), default_dtype(dtype):
        model = CogVideoXModel(config, attention=attention).eval()
        if recipe is not None:
            from torchao.quantization import quantize_

            from quant.apply import linears, plan

            shapes = [(name, (linear.out_features, linear.in_features)) for name, linear in linears(model)]
            quantize_(model, plan(shapes, recipe, device=device).to_torchao(), filter_fn=None)
        return model


def weight_bytes(model: torch.nn.Module) -> dict[str, int]:
    """Bytes of parameters and buffers by dtype, or by the type of quantized ones; the largest share first."""
    sizes: Counter[str] = Counter()
    for tensor in {id(t): t for t in (*model.parameters(), *model.buffers())}.values():
        parts = plain_tensors(tensor)
        name = str(tensor.dtype).removeprefix("torch.") if len(parts) == 1 else type(tensor.data).__name__
        sizes[name] += sum(part.nbytes for part in parts)
    return dict(sizes.most_common())


def fake_copy(model: CogVideoXModel) -> tuple[CogVideoXModel, Any]:
    """A copy without values, that runs eagerly, and the mode that its tensors are of."""
    from torch._guards import detect_fake_mode
    from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

    from cogx_fast.runtime.compiling.compile import uncompile_model

    mode = detect_fake_mode(list(model.parameters()))
    if mode is not None:
        faked = model
    else:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with FakeCopyMode(mode):
            faked = copy.deepcopy(model)
    uncompile_model(faked)
    faked.inputs.tables.clear()
    return faked, mode


def _calls(model: CogVideoXModel, videos: tuple[Size, ...]) -> list[tuple[Size, Any]]:
    """What the model is called with, and the step cache that it has then."""
    cache = model.runner.slots.reuse
    if not isinstance(cache, StepCache) or not cache.is_traceable:
        return [(video, cache) for video in videos]
    whole, *others = cache.patterns(model.config.num_layers)
    calls: list[tuple[Size, Any]] = [(video, Rehearsal(cache, whole)) for video in videos]
    return calls + [(videos[0]._replace(step=str(each)), Rehearsal(cache, each)) for each in others]


def _compile(
    model: CogVideoXModel, calls: list[tuple[Size, Any]], config: CompileConfig, spatial_factor: int, capture: Capture
) -> None:
    """Compile a copy by calling it at each size."""
    from cogx_fast.runtime.compiling.compile import RecompileWarning, compile_model, uncompile_model

    faked, mode = fake_copy(model)
    compile_model(faked, dataclasses.replace(config, strict=False), compiler=capture.compiler)
    try:
        with mode, torch.no_grad(), capture.watching():
            for index, (video, reuse) in enumerate(calls):
                capture.size = index
                faked.runner.use(dataclasses.replace(faked.runner.slots, reuse=reuse))
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always", RecompileWarning)
                    faked(**_arguments(faked, video, spatial_factor))
                told = [each for each in caught if each.category is RecompileWarning]
                capture.called([str(each.message) for each in told])
                for each in caught:
                    if each not in told:
                        warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
    finally:
        uncompile_model(faked)


def _sizes(model: CogVideoXModel, sizes: Sequence[Sequence[int]], factor: int) -> tuple[Size, ...]:
    if not sizes:
        own = default_video(model.config, spatial_factor=factor)
        sizes = ((2, own.frames, own.height, own.width),)
    found = []
    for size in sizes:
        if len(size) != 4 or size[0] < 1:
            raise ValueError(f"size is {size!r}, expected (videos in a call, frames, height, width), all 1 or more")
        video = choose_video(model.config, frames=size[1], height=size[2], width=size[3], spatial_factor=factor)
        found.append(Size(size[0], video.frames, video.height, video.width))
    return tuple(found)


def _arguments(model: CogVideoXModel, video: Size, factor: int) -> dict[str, Any]:
    """What a pipeline calls the model with; made under a fake mode, so without values."""
    config = model.config
    frames = padded_latent_frames(config, video.frames)
    height, width = video.height // factor, video.width // factor
    with torch.device(model.device):
        arguments: dict[str, Any] = {
            "hidden_states": torch.empty(video.batch, frames, config.in_channels, height, width, dtype=model.dtype),
            "encoder_hidden_states": torch.empty(
                video.batch, config.max_text_seq_length, config.text_embed_dim, dtype=model.dtype
            ),
            "timestep": torch.full((video.batch,), 500),
        }
        if config.ofs_embed_dim is not None:
            arguments["ofs"] = torch.full((1,), 2.0, dtype=model.dtype)
    return arguments


__all__ = ["empty_model", "explain", "fake_copy", "weight_bytes"]
