"""What the commands that run a pipeline to find something have in common: plan, tune steps, quantize --search."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cogx_fast.cli.arguments import MODEL_HELP, add_device, add_dtype, add_offload, add_sampling, add_size, read_size
from cogx_fast.cli.output import note, quiet_bars, warn
from cogx_fast.cli.task import read_dtype
from cogx_fast.terminal import Progress

if TYPE_CHECKING:
    from cogx_fast.pipelines.generation import Request
    from cogx_fast.pipelines.locate import Model


class Opened(NamedTuple):
    """A pipeline, and what is generated with it."""

    model: Model
    pipe: Any
    requests: list[Request]
    notes: list[str]
    """Warnings, which were shown."""


def add_pipeline(command: argparse.ArgumentParser, *, steps: int, finds: str) -> None:
    """The options of a search with a pipeline.

    Args:
        command: the parser.
        steps: denoising steps, where none are asked for.
        finds: what ``--out`` is.
    """
    command.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    command.add_argument("--prompts", nargs="+", required=True, metavar="PROMPT", help="what to generate")
    command.add_argument("--out", required=True, metavar="FILE.toml", help=f"the {finds} to write")
    command.add_argument("--image", metavar="FILE", help="the first frame, for image-to-video models")
    add_sampling(command, steps=steps)
    add_size(command)
    add_dtype(command)
    add_device(command)
    add_offload(command)


def check_out(arguments: argparse.Namespace) -> Path:
    """The file that ``--out`` names.

    Raises:
        ValueError: it is no .toml.
    """
    out = Path(arguments.out)
    if out.suffix != ".toml":
        raise ValueError(f"--out is {arguments.out!r}, expected a name that ends in .toml")
    return out


def open_pipeline(arguments: argparse.Namespace, progress: Progress, *, attention: str = "auto") -> Opened:
    """Open the pipeline that is asked for, uncompiled, and make the folder of ``--out``.

    Args:
        arguments: those of ``add_pipeline``. Without a seed each prompt has its number for one.
        progress: where to say what is going on.
        attention: the transformer's attention backend.

    Raises:
        ValueError, OSError: there is no such model, or it cannot make such a video.
    """
    from cogx_fast.pipelines import generation
    from cogx_fast.pipelines.locate import locate_pipeline

    quiet_bars()
    model = locate_pipeline(arguments.model)
    generation.check_pipeline(model, with_image=arguments.image is not None)
    size = model.video(**read_size(arguments))
    image = None if arguments.image is None else generation.read_image(arguments.image)
    requests = [
        generation.Request(
            prompt=prompt, size=size, steps=arguments.steps, guidance=arguments.guidance, image=image,
            seed=number if arguments.seed is None else arguments.seed,
        )
        for number, prompt in enumerate(arguments.prompts)
    ]  # fmt: skip
    Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)
    progress.stage(f"loading {arguments.model}")
    setting = generation.Setting(
        dtype=read_dtype(arguments), attention=attention, offload=arguments.offload, vae_tiling=arguments.vae_tiling
    )
    device = generation.choose_device(arguments.device)
    pipe = generation.open_pipeline(model, setting, device=device, size=size, tell=note(progress))
    notes = list(filter(None, [generation.dtype_warning(model, setting, device)]))
    warn(notes, progress)
    return Opened(model, pipe, requests, notes)


__all__ = ["Opened", "add_pipeline", "check_out", "open_pipeline"]
