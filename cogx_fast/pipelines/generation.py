"""How a pipeline is run: its settings, opening it with them, and one timed run from prompt to frames."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from cogx_fast.attention.backends import get_backend
from cogx_fast.config import TransformerConfig
from cogx_fast.extras import require
from cogx_fast.model.cpu import HALF, computes, slow_dtype
from cogx_fast.pipelines.accelerate import tell_scheduler
from cogx_fast.pipelines.locate import Model, read_stored_weights
from cogx_fast.pipelines.memory import OFFLOADS, estimate, place
from cogx_fast.pipelines.shared_decode import share_decode, without_decode
from cogx_fast.sizes import VideoSize, latent_frames
from cogx_fast.video.files import Frames
from cogx_fast.weights.headers import FLOATING
from cogx_fast.weights.sources import resolve

if TYPE_CHECKING:
    from cogx_fast.runtime.distributed.parallel import ParallelConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

TEXT_TO_VIDEO, IMAGE_TO_VIDEO = "CogVideoXPipeline", "CogVideoXImageToVideoPipeline"

TransformerName = Literal["cogx_fast", "diffusers"]
OURS: TransformerName = "cogx_fast"
UPSTREAM: TransformerName = "diffusers"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Which transformer a pipeline gets, and how it runs.

    Raises:
        ValueError: an unknown attention backend, or an option that diffusers' transformer does not have.
    """

    transformer: TransformerName = OURS
    dtype: torch.dtype | None = None
    """Of every part of the pipeline; None is the transformer's stored one, or fp32 on a CPU that has no instructions
    for that (``dtype_warning``)."""
    compile: bool = False
    """Compile it on its first call: ours by ``CompileConfig()``, diffusers' by ``torch.compile(fullgraph=True)``."""
    attention: str = "auto"
    """Attention backend, of our transformer alone."""
    attention_plan: str | None = None
    """Sparse attention, of our transformer alone: a built-in plan's name or a file."""
    step_cache: str | None = None
    """Which parts of steps are skipped, of our transformer alone: as ``load(step_cache=…)``."""
    loras: tuple[tuple[str, float], ...] = ()
    """LoRA files and their weights, for our transformer alone."""
    quant: str | None = None
    """Quantization recipe, of our transformer alone."""
    parallel: ParallelConfig | None = None
    """How steps are shared with the other processes of a job, of our transformer alone."""
    offload: str | None = None
    """On a GPU: one of ``memory.OFFLOADS``, "blocks" of our transformer alone; None chooses by its memory."""
    vae_tiling: bool | None = None
    """Whether the VAE decodes by tiles; None chooses on a GPU, and is no elsewhere."""

    def __post_init__(self) -> None:
        if self.offload not in (None, *OFFLOADS):
            raise ValueError(f"offload is {self.offload!r}, expected None or one of {', '.join(OFFLOADS)}")
        if self.offload == "blocks" and self.transformer == UPSTREAM:
            raise ValueError("offload is 'blocks', which diffusers' transformer does not take: use 'model' there")
        if self.attention != "auto":
            get_backend(self.attention)
        options = (
            ("attention", self.attention, "auto"),
            ("attention_plan", self.attention_plan, None),
            ("step_cache", self.step_cache, None),
            ("loras", self.loras, ()),
            ("quant", self.quant, None),
            ("parallel", self.parallel, None),
        )
        for name, value, unset in options:
            if self.transformer == UPSTREAM and value != unset:
                raise ValueError(f"{name} is {value!r}, which diffusers' transformer does not take: leave it out there")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to generate."""

    prompt: str
    size: VideoSize
    negative_prompt: str = ""
    steps: int = 50
    seed: int = 0
    guidance: float = 6.0
    image: Any = None
    """A ``PIL.Image`` to start from, for image-to-video."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run and its times, in seconds."""

    frames: Frames | None
    """``(F, H, W, 3)`` between 0 and 1, or None where only latents were asked for."""
    first_step: float
    """From the prompt to the end of the first denoising step, with compilation if it comes there."""
    steps: Sequence[float]
    """Every denoising step after the first."""
    total: float
    """From prompt to frames."""


def choose_device(name: str | None) -> torch.device:
    """The device of that name, or CUDA where there is one and else the CPU.

    Raises:
        CheckpointError: (a ValueError) there is no such device here.
    """
    from cogx_fast.loading import read_device

    return read_device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def check_pipeline(model: Model, *, with_image: bool) -> None:
    """See that a pipeline can be run from a prompt, or from a prompt and an image.

    Raises:
        ValueError: it is of another class, or an image is missing or of no use.
    """
    if model.pipeline_class not in (TEXT_TO_VIDEO, IMAGE_TO_VIDEO):
        raise ValueError(
            f"{model.name!r} is a {model.pipeline_class}; this command runs {TEXT_TO_VIDEO} and {IMAGE_TO_VIDEO}: "
            "use cogx_fast.accelerate(pipe) in Python for others"
        )
    takes_image = model.pipeline_class == IMAGE_TO_VIDEO
    if takes_image and not with_image:
        raise ValueError(f"{model.name!r} makes videos from an image: give one with --image")
    if with_image and not takes_image:
        raise ValueError(
            f"{model.name!r} makes videos from text alone: leave --image out, or use an image-to-video model"
        )


def overflow_warning(config: TransformerConfig, dtype: torch.dtype | None) -> str | None:
    """What to tell who asks for fp16 with a 5b or 1.5 model; None otherwise."""
    is_large = config.use_rotary_positional_embeddings and config.inner_dim >= 3072
    if dtype != torch.float16 or not is_large:
        return None
    return "fp16 overflows in CogVideoX 5b and 1.5 models (black or broken videos): use --dtype bf16, their own"


def dtype_warning(model: Model, setting: Setting, device: torch.device) -> str | None:
    """What to tell whose setting names no dtype, where the stored one is not taken; None where it is.

    Raises:
        ValueError, OSError: the weights' files cannot be had or read.
    """
    if setting.dtype is not None or device.type != "cpu" or all(map(computes, HALF)):
        return None
    weights = model.weights or resolve(str(model.location)).weights  # a hub id's may not be here yet
    stored = read_stored_weights(dataclasses.replace(model, weights=weights))
    dtypes = () if stored is None else stored.dtypes
    slow = slow_dtype(next((FLOATING[name] for name in dtypes if name in FLOATING), None), device)
    return slow and f"{slow}. The weights are stored so: it runs in fp32, unless --dtype says otherwise"


def open_pipeline(
    model: Model,
    setting: Setting,
    *,
    device: torch.device,
    size: VideoSize | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Any:
    """A diffusers pipeline of the model's class, with the transformer that the setting asks for in it.

    Args:
        model: a pipeline.
        setting: which transformer, and how it runs.
        device: where to run.
        size: of the video, by which a GPU's memory decides how the pipeline is laid out there; None: all of it there.
        tell: told that in a line, on a GPU.

    Raises:
        MissingDependencyError: diffusers or transformers is not installed.
        ValueError, OSError: the weights cannot be loaded (``cogx_fast.load``).
    """
    diffusers = require("diffusers", why="to run pipelines")
    require("transformers", why="to run pipelines")
    from cogx_fast.loading import load

    assert model.location is not None
    pipeline_class = getattr(diffusers, str(model.pipeline_class))
    stored = stored_dtype(model) if setting.transformer == UPSTREAM and setting.dtype is None else None
    chosen = setting.dtype if dtype_warning(model, setting, device) is None else torch.float32
    is_laid_out = size is not None and device.type == "cuda"
    if setting.transformer == UPSTREAM:
        dtype = chosen or stored
        pipe = pipeline_class.from_pretrained(model.location, torch_dtype=dtype)
    else:
        transformer = load(
            model.location,
            dtype=chosen,
            device="cpu" if is_laid_out and setting.quant is None else device,
            attention=setting.attention,
            attention_plan=setting.attention_plan,
            step_cache=setting.step_cache,
            loras=setting.loras,
            parallel=without_decode(setting.parallel),
            compile=setting.compile,
            quant=setting.quant,
        )
        pipe = pipeline_class.from_pretrained(model.location, transformer=transformer, torch_dtype=transformer.dtype)
        tell_scheduler(pipe)
        share_decode(pipe, setting.parallel)
    if size is not None and is_laid_out:
        needs = estimate(pipe, model.tokens(size), size)
        laid_out = place(pipe, device, needs, kind=setting.offload, vae_tiling=setting.vae_tiling)
        tell(laid_out.reason)
        kind = laid_out.kind
    else:
        pipe, kind = pipe.to(device), "none"
        if setting.vae_tiling:
            pipe.vae.enable_tiling()
    if setting.compile and setting.transformer == UPSTREAM:  # ours is, by load
        whole = [pipe.transformer] if kind == "none" else pipe.transformer.transformer_blocks
        for part in whole if kind != "sequential" else ():  # what moves weights at each call cannot be traced
            part.compile(fullgraph=True)
    return quiet(pipe)


def is_compiled(pipe: Any) -> bool:
    """Whether the pipeline's transformer runs compiled, which it does not with sequential offload."""
    from cogx_fast.runtime.module import CogVideoXModel

    transformer = pipe.transformer
    if isinstance(transformer, CogVideoXModel):
        return transformer.runner.compilation is not None
    return any(getattr(part, "_compiled_call_impl", None) is not None for part in transformer.modules())


def stored_dtype(model: Model) -> torch.dtype:
    """The dtype of most of the transformer's stored values, from the files' headers.

    Raises:
        ValueError: the files are not on this machine yet.
    """
    stored = read_stored_weights(model)
    names = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    dtype = names.get(next(iter(stored.dtypes))) if stored else None
    if dtype is None:
        raise ValueError(f"{model.name!r} does not say in which dtype to run diffusers' transformer: give one (bf16)")
    return dtype


def quiet(pipe: Any) -> Any:
    """The same pipeline without its own progress bar: the command line has one."""
    pipe.set_progress_bar_config(disable=True)
    return pipe


def read_image(path: str | Path) -> Any:
    """A picture as ``PIL.Image`` in RGB.

    Raises:
        OSError: there is none, or it cannot be read as one.
    """
    image_module = require("PIL.Image", why="to read images")
    try:
        with image_module.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"image {str(path)!r} is not there") from None
    except image_module.UnidentifiedImageError:
        raise OSError(f"image {str(path)!r} cannot be read as a picture: give a .png or .jpg") from None


def length_warning(config: TransformerConfig, size: VideoSize) -> str | None:
    """What to tell who asks for a length that CogVideoX's VAE cannot give; None where it can.

    Its decoder takes the first of an odd number of latent frames alone, as one frame; of an even number it makes
    ``temporal_compression_ratio`` frames from each.
    """
    ratio = config.temporal_compression_ratio
    latents = latent_frames(config, size.frames)
    if latents % 2:
        return None
    return (
        f"the VAE makes {latents * ratio} frames where {size.frames} are asked for, for it decodes latent frames "
        f"in pairs: ask for {size.frames - ratio} or {size.frames + ratio}"
    )


def truncation_warning(pipe: Any, prompt: str) -> str | None:
    """What to tell whose prompt is longer than the model reads; None where it is not."""
    limit = pipe.transformer.config.max_text_seq_length
    ids = pipe.tokenizer(prompt, verbose=False).input_ids
    if len(ids) <= limit:
        return None
    rest = pipe.tokenizer.decode(ids[limit - 1 :], skip_special_tokens=True)
    return f"the prompt has {len(ids)} tokens and this model reads {limit}: it does not see {rest!r}"


def run_pipeline(
    pipe: Any, request: Request, *, decode: bool = True, on_step: Callable[[int], None] | None = None
) -> Run:
    """Run a pipeline once, from seed to frames, and time its denoising steps.

    Initial latents come from a CPU generator, so that a seed means the same on every device.

    Args:
        pipe: a CogVideoX pipeline.
        request: what to generate.
        decode: also decode the latents to frames.
        on_step: called after each denoising step with the number of steps done.
    """
    device = pipe._execution_device  # offloaded parts lie elsewhere
    ends: list[float] = []

    def after_step(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        _synchronize(device)
        ends.append(time.perf_counter())
        if on_step is not None:
            on_step(step + 1)
        return tensors

    arguments: dict[str, Any] = {} if request.image is None else {"image": request.image}
    begin = time.perf_counter()
    with torch.no_grad():
        frames = pipe(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            height=request.size.height,
            width=request.size.width,
            num_frames=request.size.frames,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance,
            generator=torch.Generator().manual_seed(request.seed),
            max_sequence_length=pipe.transformer.config.max_text_seq_length,
            callback_on_step_end=after_step,
            output_type="np" if decode else "latent",
            **arguments,
        ).frames
    _synchronize(device)
    return Run(
        frames=np.asarray(frames[0], dtype=np.float32) if decode else None,
        first_step=ends[0] - begin,
        steps=[after - before for before, after in itertools.pairwise(ends)],
        total=time.perf_counter() - begin,
    )


def count_steps(on_step: Callable[[int], None] | None, done: int = 0) -> Callable[[int], None]:
    """An ``on_step`` for several runs of ``run_pipeline``, which tells the given one the steps done in all of them.

    Args:
        on_step: called with that number; None: nobody is told.
        done: steps done before.
    """
    numbers = itertools.count(done + 1)

    def count(_: int) -> None:
        if on_step is not None:
            on_step(next(numbers))

    return count


def median_step(runs: Sequence[Run]) -> float | None:
    """The median denoising step of all runs in seconds, without each run's first; None if there was no other."""
    steps = [seconds for run in runs for seconds in run.steps]
    return statistics.median(steps) if steps else None


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


__all__ = [
    "DTYPES", "OURS", "UPSTREAM", "Request", "Run", "Setting", "TransformerName", "check_pipeline", "choose_device",
    "count_steps", "dtype_warning", "is_compiled", "length_warning", "median_step", "open_pipeline",
    "overflow_warning", "quiet", "read_image", "run_pipeline", "stored_dtype", "truncation_warning",
]  # fmt: skip
