"""``cogx-fast explain``: what a model becomes when it is compiled."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from cogx_fast.cli.arguments import DTYPE_NAMES, add_command, add_device, add_size, count, read_size
from cogx_fast.config import PRESETS
from cogx_fast.terminal import Progress


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = add_command(
        commands, "explain", run, "compile a model without its weights and say what came of it",
        "Graphs, graph breaks and recompiles with their cause, kernels by kind with bytes and operations, compile "
        "seconds by phase. The model is compiled afresh, in a cache of its own, and neither loaded nor run.",
    )  # fmt: skip
    command.add_argument(
        "model",
        metavar="MODEL",
        help="a pipeline or transformer directory, its config.json, a .safetensors file beside one, a hub id, or one "
        f"of {', '.join([*PRESETS, 'tiny'])}",
    )
    add_size(command)
    command.add_argument(
        "--batch", type=count, default=2, help="videos in one call; guidance doubles them (default: %(default)s)"
    )
    command.add_argument(
        "--then", type=_size, action="append", default=[], metavar="B,F,H,W",
        help="call it with these videos, frames, height and width as well, to see what recompiles; may be repeated",
    )  # fmt: skip
    command.add_argument("--dtype", choices=DTYPE_NAMES, default="bf16", help="default: %(default)s")
    command.add_argument("--attention", help="attention backend (default: flex on CUDA, else sdpa)")
    command.add_argument(
        "--quant", metavar="RECIPE", help="a recipe's name or .toml file (cogx-fast recipes lists them)"
    )
    command.add_argument(
        "--step-cache", metavar="CACHE",
        help="a step cache as of generate: each kind of step that it has is compiled, too",
    )  # fmt: skip
    command.add_argument("--scope", choices=("block", "model"), default="block", help="default: %(default)s")
    command.add_argument("--mode", help="one of torch.compile's modes (default: the package's own choice)")
    command.add_argument(
        "--layers", type=count, help="compile that many layers only (for a quick look at a large model)"
    )
    command.add_argument(
        "--build", action=argparse.BooleanOptionalAction, default=True,
        help="build machine code, and start again to see what the cache gives (default: yes; without it is quicker)",
    )  # fmt: skip
    add_device(command)


def run(arguments: argparse.Namespace, progress: Progress) -> tuple[dict[str, Any], str]:
    """Carry it out: the report, and its text."""
    from cogx_fast.measure.explain import empty_model, explain
    from cogx_fast.pipelines.generation import DTYPES, choose_device
    from cogx_fast.pipelines.locate import locate, locate_pipeline
    from cogx_fast.runtime.compiling.compile import CompileConfig

    model = locate_pipeline("tiny") if arguments.model == "tiny" else locate(arguments.model)
    config = CompileConfig(scope=arguments.scope, mode=arguments.mode)
    device, video = choose_device(arguments.device), model.video(**read_size(arguments))
    sizes = [(arguments.batch, video.frames, video.height, video.width), *arguments.then]
    built = empty_model(
        dataclasses.replace(model.config, num_layers=arguments.layers or model.config.num_layers),
        attention=arguments.attention or ("flex" if device.type == "cuda" else "sdpa"),
        dtype=DTYPES[arguments.dtype],
        device=device,
        recipe=arguments.quant,
    )
    if arguments.step_cache is not None:
        built.set_step_cache(arguments.step_cache)
    progress.stage(f"compiling {arguments.model}")
    found = explain(built, *sizes, compile=config, spatial_factor=model.spatial_factor, build=arguments.build)
    return {"model": model.name, **found.to_dict()}, f"{model.name}\n\n{found}"


def _size(text: str) -> tuple[int, int, int, int]:
    numbers = text.split(",")
    if len(numbers) != 4 or not all(number.strip().isdecimal() for number in numbers):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected videos,frames,height,width, e.g. 1,49,480,720")
    batch, frames, height, width = map(int, numbers)
    return batch, frames, height, width


__all__ = ["add", "run"]
