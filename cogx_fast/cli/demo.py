"""``cogx-fast demo``: the tiny pipeline, with diffusers and with this package."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from cogx_fast.cli.arguments import DTYPE_NAMES, add_command, add_running, add_sampling, count
from cogx_fast.cli.output import finite, quiet_bars, warn
from cogx_fast.terminal import Progress

if TYPE_CHECKING:
    from cogx_fast.pipelines.demo import Column

_PROMPT = "the digit seven moving left"  # one that the tiny pipeline is trained on


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = add_command(
        commands, "demo", run, "make a small video with diffusers and with cogx_fast and compare them",
        "Generate one video with the tiny pipeline that comes with the package: with diffusers' transformer, with this "
        "package's, compiled, and with it quantized to int8 where that is offered. Writes the videos, a contact sheet "
        "and a plot; prints times, how far the videos differ and what they show.",
    )  # fmt: skip
    command.add_argument(
        "--prompt",
        default=_PROMPT,
        help="what to show: 'the digit', zero to nine, and 'moving left|right|up|down' or 'standing still' "
        "(default: %(default)r)",
    )
    command.add_argument("--out", default="out/demo", metavar="DIR", help="where to write (default: %(default)s)")
    command.add_argument("--rounds", type=count, default=3, help="timed runs of each, in turns (default: %(default)s)")
    command.add_argument("--dtype", choices=DTYPE_NAMES, default="fp32", help="default: %(default)s")
    add_sampling(command, steps=25)
    add_running(command, compile_default=True, compile_help="compile the transformer (default)")


def run(arguments: argparse.Namespace, progress: Progress) -> tuple[dict[str, Any], str]:
    """Carry it out: the report, and its text."""
    from cogx_fast.config import TransformerConfig
    from cogx_fast.pipelines.demo import render, run_demo, settings
    from cogx_fast.pipelines.generation import DTYPES, Request, choose_device
    from cogx_fast.sizes import default_video

    quiet_bars()
    device = choose_device(arguments.device)
    request = Request(
        prompt=arguments.prompt,
        size=default_video(TransformerConfig.preset("tiny")),
        steps=arguments.steps,
        seed=arguments.seed,
        guidance=arguments.guidance,
    )
    columns = settings(dtype=DTYPES[arguments.dtype], attention=arguments.attention, compile=arguments.compile)
    result = run_demo(request, columns, out=arguments.out, device=device, rounds=arguments.rounds, progress=progress)
    warn(result.warnings, progress)
    report = {
        "prompt": request.prompt,
        "seed": request.seed,
        "steps": request.steps,
        "guidance": request.guidance,
        "rounds": result.rounds,
        "device": str(device),
        "dtype": arguments.dtype,
        "columns": [_report(column, result.columns[0]) for column in result.columns],
        "files": {name: str(path) for name, path in result.files.items()},
        "warnings": list(result.warnings),
    }
    return report, render(result, request, device=device)


def _report(column: Column, reference: Column) -> dict[str, Any]:
    return {
        "name": column.name,
        "compiled": column.setting.compile,
        "quant": column.setting.quant,
        "seconds_per_step": column.seconds_per_step,
        "ratio": column.ratio(reference),
        "first_step_seconds": column.first_step,
        "compile_seconds": column.compile_seconds,
        **{"graphs": column.graphs, "breaks": column.breaks, "recompiles": column.recompiles},
        "psnr_db": finite(column.psnr_db),
        "identical": column.psnr_db == float("inf"),
        "ssim": column.ssim,
        "shows": column.shows,
        "video": str(column.video),
    }


__all__ = ["add", "run"]
