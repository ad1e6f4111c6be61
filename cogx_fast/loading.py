"""``load``: from where the weights are to a model that is ready to run."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cogx_fast.assets import tiny_pipeline_dir
from cogx_fast.attention.backends import get_backend
from cogx_fast.model.cpu import SlowDtypeWarning, slow_dtype
from cogx_fast.runtime import composition
from cogx_fast.runtime.attached import is_from
from cogx_fast.runtime.auto_attention import AttentionFor
from cogx_fast.runtime.baked import read_schedule
from cogx_fast.runtime.distributed.sharded import is_asked_for
from cogx_fast.runtime.for_diffusers.source import check_source
from cogx_fast.runtime.for_diffusers.upstream import model_class
from cogx_fast.runtime.options import Options
from cogx_fast.runtime.streaming import Offload, check_offload, stream_blocks
from cogx_fast.sizes import count_tokens, default_video
from cogx_fast.weights.assemble import Store, Transform, assemble
from cogx_fast.weights.checkpoint import FileStore
from cogx_fast.weights.errors import CheckpointError
from cogx_fast.weights.live import LiveStore, return_freed_memory
from cogx_fast.weights.lora import LoraLike
from cogx_fast.weights.merge import Merge, Merged
from cogx_fast.weights.quantize import Quantize
from cogx_fast.weights.sources import ConfigLike, resolve

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from cogx_fast.attention.plan import AttentionPlan
    from cogx_fast.runtime.compiling.compile import CompileConfig
    from cogx_fast.runtime.distributed.parallel import ParallelConfig
    from cogx_fast.runtime.module import CogVideoXModel
    from cogx_fast.runtime.step_caching.step_schedule import StepSchedule
    from quant import Recipe

_GUIDED_BATCH = 2
"""Videos in a call of a pipeline with guidance: one with the prompt, one without."""
_DTYPES: dict[str, torch.dtype] = {
    "bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "fp16": torch.float16, "float16": torch.float16,
    "fp32": torch.float32, "float32": torch.float32, "fp64": torch.float64, "float64": torch.float64,
}  # fmt: skip


def load(
    source: str | os.PathLike[str] | nn.Module,
    *,
    config: ConfigLike | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | int | None = None,
    attention: str = "auto",
    attention_plan: AttentionPlan | str | os.PathLike[str] | None = None,
    step_cache: StepSchedule | str | os.PathLike[str] | None = None,
    parallel: ParallelConfig | DeviceMesh | None = None,
    compile: bool | CompileConfig = False,
    compile_cache: str | os.PathLike[str] | None = None,
    quant: str | os.PathLike[str] | Recipe | None = None,
    loras: Sequence[LoraLike] = (),
    offload: str | None = None,
    schedule: Any = None,
    keep_source: bool = True,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    check_finite: bool = False,
    variant: str | None = None,
) -> CogVideoXModel:
    """Load a CogVideoX transformer.

    Args:
        source: a diffusers pipeline's directory or its ``transformer`` folder; a ``.safetensors`` file or the index of
            several; a hub id, or a released model's short name ("5b"); "tiny", the trained pipeline that comes with
            the package; or a live model, diffusers' or ours, whose weights are shared (``weights.live``). Adapters on
            it must be merged; anything else that is attached to it (hooks, patches, processors) is refused by name
            (``runtime.for_diffusers.source``).
        config: for files without a ``config.json`` beside them, or in its place: a configuration, a mapping, a path, or
            the name of a released model ("5b").
        dtype: of all weights, a ``torch.dtype`` or its name ("bf16", "fp16", "fp32"); None keeps them as stored. Where
            the model is to run on a CPU that has no instructions for it, a ``SlowDtypeWarning`` says so.
        device: where the weights go; None means the CPU for files, and where they are for a live model. On the CPU,
            tensors that need no change stay mapped from the files (as diffusers does): do not write to a file in place
            while a model uses it (``save_pretrained`` does not).
        attention: the attention backend, a name from ``cogx_fast.attention.backends.BACKENDS``; or "auto": on CUDA the
            exact ones are timed once at the model's usual size and the answer is kept on disk; elsewhere sdpa,
            and flex with a plan. A model that is moved to another device later (``pipe.to("cuda")``, offload)
            chooses at its first call there. ``model.attention_choice`` says why.
        attention_plan: sparse attention (approximate): a file of `cogx-fast plan`, "radial", "tiles" or an
            ``AttentionPlan``. None is dense, or the plan of a live model of ours.
        step_cache: skip parts of denoising steps (approximate): "quality", "balanced" or "fast" (1.5, 2 or 3 times
            fewer blocks), "teacache:0.2", "mask:1,1,0,…", the .toml file of a schedule, or "first-block:0.08", which
            decides step by step. Not with ``scope="model"``.
        parallel: share each step with the other processes of a job (``torchrun``), all of which call this: a
            ``ParallelConfig(guidance=2, sequence=4)``, or a ``DeviceMesh`` with these dimensions. With
            ``shard_weights=True`` each keeps its share of the blocks' weights alone
            (``runtime.distributed.sharded``). Not with ``scope="model"``.
        compile: compile the model, with the default ``CompileConfig`` or a given one.
        compile_cache: start warm from this file, which ``model.save_compile_cache`` wrote: its code is run, so take it
            only from where you trust code. One that does not fit is not used, with a warning that says why.
        quant: quantize with a recipe: the name of a shipped one (``cogx-fast recipes`` lists them), the path of a
            ``.toml`` file, or a ``quant.Recipe``. Weights are quantized block by block as they are read. Those that
            are quantized already need none, and take no other than their own.
        loras: LoRA files (``.safetensors``), merged into the weights in this order before they are quantized: each a
            path, ``(path, weight)``, or a ``cogx_fast.Lora``, which can say its alpha (``weights.lora`` lists what is
            read). Of a live model the merged weights are copies; its own stay as they are.
        offload: "blocks" keeps the blocks' weights in host memory and copies each to the device while the one before
            it computes (``runtime.streaming``): the device holds two blocks of them and the rest of the model. For
            inference; not with ``scope="model"`` or CUDA graphs. ``model.to(device)`` says where it computes.
        schedule: bake the conditioning (``runtime.baked``): True, a diffusers scheduler, or timesteps as numbers. The
            modulation's weights (a seventh of 5b) stay in host memory; a table of the timesteps that a pipeline's
            scheduler has is made of them as they change. For inference.
        keep_source: of a live model: it keeps its own weights beside the quantized ones. False: each is given up as
            soon as the new one is there, and the source cannot be used any more.
        revision: branch, tag or commit of a hub id.
        cache_dir: the hub's cache, if another than huggingface_hub's own.
        local_files_only: take a hub id from the cache only.
        check_finite: refuse infinite and NaN weights; costs a pass over all of them.
        variant: the ``<variant>`` in ``diffusion_pytorch_model.<variant>.safetensors``.

    Returns:
        The model, in evaluation mode, its parameters with gradients enabled as diffusers' ``from_pretrained`` leaves
        them.

    Raises:
        CheckpointError: (a ValueError) damaged or foreign weights, or a dtype or device that is not there.
        CheckpointNotFoundError: (also a FileNotFoundError) nothing there, or a file that belongs to it is missing.
        AttachedError: (a ValueError) a live model with something attached to it that would be lost.
        ConfigError: (a ValueError) a configuration that is no CogVideoX transformer's.
        StepCacheError: (a ValueError) a step schedule that is none, before anything is loaded, or another model's.
        PlanError: (a ValueError) an attention plan that is none, or another model's.
        ValueError: an attention backend that is not known or cannot run here; the message says what to do.
        ShardError: (a ValueError) sharded weights do not go with ``quant``; before anything is loaded.
        OffloadError: (a ValueError) ``offload`` does not go with the rest; before anything is loaded.
        ScheduleError: (a ValueError) ``schedule`` is none; before anything is loaded.
        LoraError: (a ValueError) a LoRA file that is damaged, another model's, or of a kind that cannot be merged.
        QuantError: (a ValueError) a recipe that does not fit the model or cannot run here; before weights are read.
    """
    if compile_cache is not None and not compile:
        raise ValueError("compile_cache is given, but compile is False: pass compile=True or leave it out")
    check_offload(offload)
    place = None if device is None else read_device(device)
    if schedule is not None:
        read_schedule(schedule)
    if attention_plan is None:
        attention_plan = getattr(source, "attention_plan", None)
    options = Options(
        plan=attention_plan, attention=attention, step_cache=step_cache, parallel=parallel, compile=compile,
        offload=offload, quant=quant,
    )  # fmt: skip
    composition.check(options.features())
    model = load_weights(
        source,
        model_class(),
        config=config,
        dtype=dtype,
        device=None if is_asked_for(parallel) else place,  # what is to be shared is never whole there
        attention="flex" if attention == "auto" and attention_plan is not None else attention,  # it takes plans
        compiled=bool(compile),
        quant=quant,
        loras=loras,
        offload=offload is not None,
        schedule=schedule,
        keep_source=keep_source,
        revision=revision,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        check_finite=check_finite,
        variant=variant,
        check=options.check,
    )
    options.set_on(model)
    if is_asked_for(parallel) and place is not None:
        model.to(place)
    if not compile:
        _warn_if_slow(model)
    if compile_cache is not None:
        from cogx_fast.runtime.compiling.warm_start import load_compile_cache

        load_compile_cache(model, compile_cache)
    return model


def load_package(
    path: str | os.PathLike[str],
    weights: str | os.PathLike[str] | nn.Module,
    *,
    device: torch.device | str | int | None = None,
    offload: str | None = None,
    for_pipelines: bool | None = None,
) -> CogVideoXModel:
    """A model that runs a package's compiled code, with weights of your choice and no compiler.

    This runs the library that the file holds: take packages only from where you would take a program from. Its
    checksums are against damage, not malice. Everything is checked before any of its code is loaded.

    Args:
        path: what ``cogx-fast export`` or ``export_package`` wrote.
        weights: a checkpoint of the package's configuration, or a live model; anything that ``load`` takes. They are
            quantized with the package's recipe, if it has one.
        device: the device to run on; None is the first of the package's kind.
        offload: as of ``load``.
        for_pipelines: build the class that diffusers' ``from_pretrained`` takes, which imports diffusers; None: if
            diffusers has been imported already. Otherwise it is a plain module, called the same way.

    Returns:
        The model, for inference, called as always. Calls outside the package's sizes raise ``ValueError``.

    Raises:
        ArtifactError: (a ValueError) the file is damaged, or made for another version, device or configuration.
        CheckpointError: (a ValueError) the weights cannot be loaded.
    """
    from cogx_fast.runtime.packages.package import Package

    check_offload(offload)
    package = Package.read(path, device)
    model = load_weights(
        weights,
        model_class(for_pipelines),
        attention=package.manifest["attention"],
        compiled=True,
        dtype=package.manifest["dtype"],
        device=package.device,
        quant=package.recipe,
        offload=offload is not None,
    )
    package.run(model)
    return model


def load_weights(
    source: str | os.PathLike[str] | nn.Module,
    build: type[CogVideoXModel],
    *,
    attention: str,
    compiled: bool,
    config: ConfigLike | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | int | None = None,
    quant: str | os.PathLike[str] | Recipe | None = None,
    loras: Sequence[LoraLike] = (),
    offload: bool = False,
    schedule: Any = None,
    keep_source: bool = True,
    check_finite: bool = False,
    check: Callable[[CogVideoXModel], None] = lambda model: None,
    **files: Any,
) -> CogVideoXModel:
    """``load`` up to where it is decided how the model runs.

    Args:
        source, config, dtype, device, quant, loras, keep_source, check_finite: as of ``load``.
        build: the class (``runtime.for_diffusers.upstream.model_class``).
        attention: as of ``load``.
        compiled: "auto" times attention as it runs compiled.
        offload: whether the blocks are streamed.
        schedule: as of ``load``.
        check: looks at the model without weights, before any is read, and raises.
        files: ``revision``, ``cache_dir``, ``local_files_only`` and ``variant`` of ``load``.

    Returns:
        The model, eager, in evaluation mode.

    Raises:
        As ``load``.
    """
    wanted = None if dtype is None else read_dtype(dtype)
    place = None if device is None else read_device(device)
    if isinstance(source, nn.Module) and config is not None:
        raise CheckpointError("config is given together with a live model, which has its own: leave it out")
    if attention != "auto":
        get_backend(attention)  # a wrong name fails before anything is read
    if not isinstance(source, nn.Module | str | os.PathLike):
        raise CheckpointError(_not_a_source(source))
    home = place or (_home(source) if isinstance(source, nn.Module) else torch.device("cpu"))
    transforms: list[Transform] = []
    merge = Merge(loras) if loras else None
    if merge is not None:
        transforms.append(merge)
    if quant is not None:
        transforms.append(Quantize(quant, home))
    is_split = offload or schedule is not None  # then parts that stay in host memory are never put on the device
    if offload and transforms:
        transforms.append(Offload())
    if isinstance(source, nn.Module):
        store: Store = LiveStore(source, check_attached=check_source, keep=keep_source)
    else:
        store = FileStore(resolve(tiny_pipeline_dir() if source == "tiny" else source, config=config, **files))

    def check_all(model: CogVideoXModel) -> None:
        if attention != "auto":
            model._use_attention(attention, home)
        check(model)

    read_to = None if is_split else place
    model = assemble(
        store, build, transforms=transforms, check=check_all, dtype=wanted, device=read_to, check_finite=check_finite
    )
    model.merged = Merged(store.config, store) if merge is None or merge.merged is None else merge.merged
    if isinstance(source, nn.Module):
        return_freed_memory()
        if getattr(source, "gradient_checkpointing", False):
            run: Any = source._gradient_checkpointing_func
            model.enable_gradient_checkpointing(None if is_from(run, "diffusers") else run)
    else:
        model.register_to_config(_name_or_path=str(source))
    model.merged.note(model)
    if schedule is not None:
        model.set_schedule(schedule)
    if offload:
        stream_blocks(model, home)
    elif is_split:
        model.to(home)
    model.eval()
    _set_attention(model, attention, compiled=compiled)
    if place is not None or not torch.accelerator.is_available():  # else it may be on its way to another device
        _warn_of_slow_dtype(model)
    return model


def _warn_if_slow(model: CogVideoXModel) -> None:
    from quant import recipe_of

    recipe = recipe_of(model)
    if recipe is not None and recipe.dynamic:
        warnings.warn(
            f"recipe {recipe.name!r} quantizes activations, which is slower than no quantization at all unless it is "
            "compiled: pass compile=True",
            stacklevel=3,
        )


def _warn_of_slow_dtype(model: CogVideoXModel) -> None:
    slow = slow_dtype(model.dtype, model.device)
    if slow is not None:
        text = f'{slow}. Use fp32: dtype="fp32", on the command line --dtype fp32'
        warnings.warn(text, SlowDtypeWarning, stacklevel=1)  # of one place, not the caller's: Python shows it once


def read_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A floating-point dtype of 16 bits or more, from itself or its name.

    Raises:
        CheckpointError: it is none.
    """
    name = str(dtype).removeprefix("torch.").lower()
    if name not in _DTYPES:
        raise CheckpointError(f"dtype is {dtype!r}, expected one of {', '.join(_DTYPES)} or the torch dtype")
    return _DTYPES[name]


def read_device(device: torch.device | str | int) -> torch.device:
    """A device that is there.

    Raises:
        CheckpointError: unknown, not on this machine, or meta, which holds no weights.
    """
    try:
        place = torch.device(device)
        if place.type == "meta":
            raise CheckpointError(
                "device is meta, which holds no weights: build CogVideoXModel under torch.device('meta')"
            )
        return torch.empty(0, device=place).device
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = str(error).split("\n")[0]
        raise CheckpointError(
            f"device {device!r} cannot be used ({reason}): choose one that is there, e.g. 'cpu'"
        ) from None


def _set_attention(model: CogVideoXModel, attention: str, *, compiled: bool) -> None:
    if attention == "auto":
        config = model.config
        tokens = count_tokens(config, default_video(config)).joint
        shape = (_GUIDED_BATCH, tokens, config.num_attention_heads, config.attention_head_dim)
        model._choose_attention(AttentionFor(shape=shape, device=model.device, compiled=compiled))
    else:
        model.set_attention_backend(attention)


def _home(source: nn.Module) -> torch.device:
    """Where a live model is, as far as its first weight tells."""
    return next((parameter.device for parameter in source.parameters()), torch.device("cpu"))


def _not_a_source(source: object) -> str:
    hint = ": pass its .transformer, or call cogx_fast.accelerate(pipe)" if hasattr(source, "transformer") else ""
    return f"source is a {type(source).__name__}, expected a path, a hub id or a CogVideoX transformer{hint}"


__all__ = ["load", "load_package", "load_weights", "read_device", "read_dtype"]
