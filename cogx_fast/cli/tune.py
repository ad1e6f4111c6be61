"""``cogx-fast tune steps``: find a step schedule for a model."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from cogx_fast.cli.arguments import add_command, count
from cogx_fast.cli.searching import add_pipeline, check_out, open_pipeline
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
    add_pipeline(command, steps=50, finds="schedule")
    command.add_argument(
        "--speedup", type=float, default=2.0, metavar="X", help="how many times fewer blocks (default: %(default)s)"
    )
    command.add_argument("--tokens", type=count, default=256, help="tokens sampled (default: %(default)s)")


def run(arguments: argparse.Namespace, progress: Progress) -> tuple[dict[str, Any], str]:
    """Carry it out: the report, and its text."""
    from cogx_fast.runtime.step_caching.step_schedule_file import write_schedule
    from cogx_fast.tune.steps import find_schedule

    out = check_out(arguments)
    opened = open_pipeline(arguments, progress)
    state = out.with_suffix(".npz")
    found = find_schedule(
        opened.pipe,
        opened.requests,
        speedup=arguments.speedup,
        tokens=arguments.tokens,
        state=state,
        on_step=progress.steps("recording and trying", 2 * len(opened.requests) * arguments.steps),
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
        "warnings": opened.notes,
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
