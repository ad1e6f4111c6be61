"""``cogx-fast generate``: one video with any CogVideoX pipeline."""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cogx_fast.cli.arguments import MODEL_HELP, add_command, add_video, count
from cogx_fast.cli.output import note, quiet_bars, warn
from cogx_fast.cli.task import Task, read_task
from cogx_fast.extras import require
from cogx_fast.terminal import Progress

if TYPE_CHECKING:
    from cogx_fast.pipelines.generation import Run


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = add_command(
        commands, "generate", run, "make a video with any CogVideoX pipeline",
        "Generate a video with a CogVideoX pipeline whose transformer is replaced by this package's.",
    )  # fmt: skip
    command.add_argument("--model", required=True, help=MODEL_HELP)
    command.add_argument("--prompt", required=True, help="what to show")
    command.add_argument("--out", required=True, metavar="FILE.mp4", help="the video to write")
    command.add_argument(
        "--nproc", type=count, default=1, metavar="N", help="processes of this machine (one for each GPU) that share it"
    )
    add_video(command)


def run(arguments: argparse.Namespace, progress: Progress) -> tuple[dict[str, Any], str]:
    """Carry it out, by as many processes as are asked for: the report, and its text."""
    from cogx_fast.pipelines import workers

    if workers.is_worker():
        from cogx_fast.runtime.distributed import ranks

        ranks.start()  # which also chooses this process's GPU
        arguments.nproc = int(os.environ["WORLD_SIZE"])
        return _generate(_shared(read_task(arguments), arguments.nproc), arguments, progress)
    if arguments.nproc == 1:
        return _generate(read_task(arguments), arguments, progress)
    _shared(read_task(arguments), arguments.nproc)  # what cannot be shared is refused before anything is started
    report = workers.start(arguments.nproc, [*_without_nproc(arguments.argv), "--json"])
    return report, _render(report)


def _without_nproc(argv: list[str]) -> list[str]:
    """The command line for a worker; torchrun, which reads over it, takes ``--nproc`` for an option of its own."""
    at = next(index for index, text in enumerate(argv) if text.startswith("--np"))
    return argv[:at] + argv[at + (1 if "=" in argv[at] else 2) :]


def _shared(task: Task, processes: int) -> Task:
    """The task as each of so many processes has it."""
    from cogx_fast.runtime.distributed.parallel import ParallelConfig

    heads, guided = task.model.config.num_attention_heads, task.request.guidance > 1
    shares_decode = task.setting.vae_tiling is True
    parallel = ParallelConfig.for_ranks(processes, heads, guided=guided, decode=shares_decode)
    return replace(task, setting=replace(task.setting, parallel=parallel))


def _generate(task: Task, arguments: argparse.Namespace, progress: Progress) -> tuple[dict[str, Any], str]:
    from cogx_fast.pipelines import generation
    from cogx_fast.runtime.compiling.compile import watch_compilation
    from cogx_fast.video import files

    out = files.check_writable(arguments.out, ".mp4")
    require("imageio_ffmpeg", why="to write videos")
    model, request, device = task.model, task.request, task.device

    quiet_bars()
    progress.stage(f"loading {arguments.model}")
    begin = time.perf_counter()
    pipe = generation.open_pipeline(model, task.setting, device=device, size=request.size, tell=note(progress))
    load_seconds = time.perf_counter() - begin
    notes = task.warnings(pipe)
    warn(notes, progress)
    is_first = int(os.environ.get("RANK", 0)) == 0
    with watch_compilation() as compilation:
        on_step = progress.steps("denoising", request.steps)
        shares_decode = task.setting.parallel is not None and task.setting.parallel.decode
        run = generation.run_pipeline(pipe, request, decode=is_first or shares_decode, on_step=on_step)
    if not is_first:  # which has the video
        return {}, ""
    assert run.frames is not None
    progress.stage("writing the video")
    files.write_video(out, run.frames, fps=task.fps)
    report = {
        "out": str(out),
        **{"model": arguments.model, "pipeline_class": model.pipeline_class},
        **{"prompt": request.prompt, "negative_prompt": request.negative_prompt},
        **task.facts(pipe),
        **{"frames": len(run.frames), "height": request.size.height, "width": request.size.width, "fps": task.fps},
        "device": str(device),
        "processes": arguments.nproc,
        "seconds": _seconds(run, load_seconds, compilation.seconds),
        **{"graphs": compilation.graphs, "breaks": compilation.breaks, "recompiles": compilation.recompiles},
        "warnings": notes,
    }
    return report, _render(report)


def _seconds(run: Run, load: float, compiling: float) -> dict[str, float | None]:
    from cogx_fast.pipelines.generation import median_step

    return {
        "load": load,
        "total": run.total,
        "first_step": run.first_step,
        "median_step": median_step([run]),
        "compile": compiling,
    }


def _render(report: dict[str, Any]) -> str:
    from cogx_fast.sizes import VideoSize

    seconds = report["seconds"]
    size = VideoSize(frames=report["frames"], height=report["height"], width=report["width"])
    steps = f"{report['steps']} step" + ("s" if report["steps"] != 1 else "")
    if seconds["median_step"] is not None:
        steps += f" of {seconds['median_step']:.3g} s (prompt to first step {seconds['first_step']:.3g} s)"
    by = f"{report['processes']} × " if report["processes"] > 1 else ""
    compiled = f", compiled in {seconds['compile']:.1f} s" if report["compiled"] else ""
    return (
        f"{report['out']}: {size}, {report['fps']} fps\n"
        f"{seconds['total']:.1f} s: {steps}, {report['dtype']} on {by}{report['device']}{compiled}; "
        f"loading took {seconds['load']:.1f} s"
    )


__all__ = ["add", "run"]
