"""``cogx-fast tune steps``: find a step schedule for a model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogx_fast.cli.arguments import DTYPE_NAMES, MODEL_HELP, add_command, add_offload, add_sampling, add_size, count
from cogx_fast.cli.output import note, quiet_bars, warn
from cogx_fast.terminal import Progress

if TYPE_CHECKING:
    from cogx_fast.tune.steps import Found


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = add_command(
        commands, "tune", run, "find a step schedule for a model",
        "Make a few videos whole, record how far each step's prediction is off when an earlier step's blocks stand in, "
        "and write the schedule with the least error for so many fewer blocks: load(..., step_cache=FILE). A search "
        "that was stopped goes on.",
    )  # fmt: skip
    command.add_argument("what", choices=["steps"], help="what to tune")
    command.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    command.add_argument("--prompts", nargs="+", required=True, metavar="PROMPT", help="what to generate")
    command.add_argument(
        "--speedup", type=float, default=2.0, metavar="X", help="how many times fewer blocks (default: %(default)s)"
    )
    command.add_argument("--out", required=True, metavar="FILE.toml", help="the schedule to write")
    command.add_argument("--image", metavar="FILE", help="the first frame, for image-to-video models")
    add_sampling(command, steps=50)
    add_size(command)
    command.add_argument("--tokens", type=count, default=256, help="tokens sampled (default: %(default)s)")
    command.add_argument(
        "--dtype", choices=DTYPE_NAMES, help="default: as the weights are stored; fp32 on a CPU that lacks theirs"
    )
    command.add_argument("--device", help="cpu, cuda, cuda:1, … (default: cuda where there is one)")
    add_offload(command)


def run(arguments: argparse.Namespace, progress: Progress) -> tuple[dict[str, Any], str]:
    """Carry it out: the report, and its text."""
    from cogx_fast.pipelines import generation
    from cogx_fast.pipelines.locate import locate_pipeline
    from cogx_fast.runtime.step_schedule_file import write_schedule
    from cogx_fast.sizes import choose_video
    from cogx_fast.tune.steps import find_schedule

    out = Path(arguments.out)
    if out.suffix != ".toml":
        raise ValueError(f"--out is {arguments.out!r}, expected a name that ends in .toml")
    quiet_bars()
    model = locate_pipeline(arguments.model)
    generation.check_pipeline(model, with_image=arguments.image is not None)
    size = choose_video(
        model.config, frames=arguments.frames, height=arguments.height, width=arguments.width,
        spatial_factor=model.spatial_factor,
    )  # fmt: skip
    image = None if arguments.image is None else generation.read_image(arguments.image)
    requests = [
        generation.Request(
            prompt=prompt, size=size, steps=arguments.steps, seed=arguments.seed, guidance=arguments.guidance,
            image=image,
        )
        for prompt in arguments.prompts
    ]  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    progress.stage(f"loading {arguments.model}")
    dtype = None if arguments.dtype is None else generation.DTYPES[arguments.dtype]
    setting = generation.Setting(dtype=dtype, offload=arguments.offload, vae_tiling=arguments.vae_tiling)
    place = generation.choose_device(arguments.device)
    pipe = generation.open_pipeline(model, setting, device=place, size=size, tell=note(progress))
    notes = list(filter(None, [generation.dtype_warning(model, setting, place)]))
    warn(notes, progress)
    state = out.with_suffix(".npz")
    total = 2 * len(requests) * arguments.steps
    found = find_schedule(
        pipe,
        requests,
        speedup=arguments.speedup,
        tokens=arguments.tokens,
        state=state,
        on_step=progress.steps("recording and trying", total),
    )
    write_schedule(found.schedule, out)
    picture = out.with_suffix(".png")
    _draw(found, arguments.model).save(picture)
    state.unlink(missing_ok=True)
    report = {
        "out": str(out),
        "plot": str(picture),
        "model": arguments.model,
        "steps": found.schedule.steps,
        "whole_steps": [step for step, blocks in enumerate(found.schedule.blocks) if blocks],
        "speedup": found.schedule.speedup,
        "error": found.schedule.error,
        "worst_error": found.worst,
        "bounds": list(found.bounds),
        "warnings": notes,
    }
    return report, _render(report)


def _draw(found: Found, model: str) -> Any:
    from cogx_fast.video.plots import plot_schedule

    return plot_schedule(
        found.bounds, found.schedule.blocks, error=found.schedule.error or 0.0, title=f"Which steps to compute: {model}"
    )


def _render(report: dict[str, Any]) -> str:
    whole = ", ".join(str(step + 1) for step in report["whole_steps"])
    return (
        f"{report['out']}: {len(report['whole_steps'])} of {report['steps']} steps whole ({whole}), "
        f"{report['speedup']:.2f} times fewer blocks\n"
        f"relative error of the final latents: {report['error']:.4f}, largest {report['worst_error']:.4f}\n"
        f"plot: {report['plot']}\n"
        f"use it: load(..., step_cache={report['out']!r}, compile=True)"
    )


__all__ = ["add", "run"]
