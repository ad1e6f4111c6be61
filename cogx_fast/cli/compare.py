"""``cogx-fast compare``: two video files, or two settings of a pipeline, beside each other."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogx_fast.cli.arguments import MODEL_HELP, add_command, add_video
from cogx_fast.cli.output import finite, note, quiet_bars, warn
from cogx_fast.cli.task import change_task, read_task
from cogx_fast.terminal import Progress, table

if TYPE_CHECKING:
    from cogx_fast.cli.task import Task
    from cogx_fast.video.compare import Comparison, Side

_NAMES = ("A", "B")


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """The two videos, where they come from, and what making them took."""

    sides: tuple[Side, Side]
    fps: float
    title: str
    note: str
    facts: dict[str, Any]
    """What both have in common, for the report."""
    seconds: tuple[dict[str, Any], ...] = ()
    """Times of each, where they were generated."""
    shows: tuple[str, ...] = ()
    """What the judge reads in each, where it can."""
    warnings: tuple[str, ...] = ()


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = add_command(
        commands, "compare", run, "compare two videos, or two settings of a pipeline",
        "Two video files: cogx-fast compare a.mp4 b.mp4. Two settings of a pipeline: cogx-fast compare --model MODEL "
        "--prompt PROMPT dtype=fp32 dtype=bf16,compile=on, where A and B change transformer (cogx_fast, diffusers), "
        "dtype, compile (on, off), attention, steps, guidance or seed, and the options below hold for both. Writes the "
        "videos side by side, a contact sheet and a plot; prints PSNR, SSIM and, for settings, times.",
    )  # fmt: skip
    command.add_argument("a", metavar="A", help="a video file, or a setting: key=value,key=value")
    command.add_argument("b", metavar="B", help="the same for the other")
    command.add_argument("--out", default="out/compare", metavar="DIR", help="where to write (default: %(default)s)")
    command.add_argument("--model", help=f"for settings: {MODEL_HELP}")
    command.add_argument("--prompt", help="for settings: what to show")
    known = set(vars(command.parse_args(["a", "b"])))
    add_video(command)
    added = vars(command.parse_args(["a", "b"]))
    command.set_defaults(unset={name: value for name, value in added.items() if name not in known})


def run(arguments: argparse.Namespace, progress: Progress) -> tuple[dict[str, Any], str]:
    """Carry it out: the report, and its text."""
    from cogx_fast.video.compare import check_dependencies, compare_videos, write_comparison
    from cogx_fast.video.files import check_directory

    words = (arguments.a, arguments.b)
    kinds = [_is_setting(word) for word in words]
    if any(kinds) and not all(kinds):
        file, setting = sorted(words, key=_is_setting)
        raise ValueError(f"{setting!r} is a setting and {file!r} is none: give two settings, or two video files")
    are_settings = arguments.model is not None or all(kinds)
    tasks = _read_tasks(arguments) if are_settings else None
    if tasks is None:
        _refuse_options(arguments)
    out = check_directory(arguments.out)
    check_dependencies()
    pair = _read_files(words) if tasks is None else _generate(tasks, words, progress)
    warn(pair.warnings, progress)
    progress.stage("comparing")
    found = compare_videos(pair.sides[0].frames, pair.sides[1].frames)
    progress.stage("writing files")
    files = write_comparison(out, pair.sides, found, title=pair.title, note=pair.note, fps=pair.fps)
    report = {
        "a": arguments.a,
        "b": arguments.b,
        **pair.facts,
        **_report(found),
        "seconds": list(pair.seconds) or None,
        "shows": list(pair.shows) or None,
        "files": {name: str(path) for name, path in files.items()},
        "warnings": list(pair.warnings),
    }
    return report, _render(pair, found, files, words)


# ----------------------------------------------------------------------------------------------- where videos come from


def _is_setting(word: str) -> bool:
    return "=" in word and not Path(word).exists()


def _refuse_options(arguments: argparse.Namespace) -> None:
    names = ["prompt", *arguments.unset]
    unset = {"prompt": None, **arguments.unset}
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(arguments, name) != unset[name]]
    if given:
        raise ValueError(
            f"{', '.join(given)} is for settings, and {arguments.a!r} and {arguments.b!r} are files: leave it out, or "
            "give --model and settings (key=value)"
        )


def _read_files(paths: tuple[str, str]) -> _Pair:
    from cogx_fast.sizes import VideoSize
    from cogx_fast.video.compare import Side, check_shapes
    from cogx_fast.video.files import read_rate, read_video

    first, second = (
        Side(name=name, words=words, frames=read_video(path))
        for name, words, path in zip(_NAMES, _short(paths), paths, strict=True)
    )
    check_shapes(first.frames, second.frames, paths)
    rates = [read_rate(path) for path in paths]
    notes = []
    if rates[0] != rates[1]:
        notes.append(
            f"{paths[0]} plays at {rates[0]:g} frames a second, {paths[1]} at {rates[1]:g}: the first with the first, "
            f"the second with the second frame and so on, at {rates[0]:g}"
        )
    length, height, width = first.frames.shape[:3]
    size = VideoSize(frames=length, height=height, width=width)
    return _Pair(
        sides=(first, second),
        fps=rates[0],
        title=f"{first.words} and {second.words}",
        note=f"{size} · {rates[0]:g} fps",
        facts={"frames": length, "height": height, "width": width, "fps": rates[0]},
        warnings=tuple(notes),
    )


def _short(paths: tuple[str, str]) -> tuple[str, ...]:
    """The files' names, with their folders' where they have the same."""
    first, second = (Path(path) for path in paths)
    parts = 1 if first.name != second.name else 2
    return tuple("/".join(path.parts[-parts:]) for path in (first, second))


def _read_tasks(arguments: argparse.Namespace) -> tuple[Task, Task]:
    if arguments.model is None or arguments.prompt is None:
        missing = "--model" if arguments.model is None else "--prompt"
        raise ValueError(f"{arguments.a!r} and {arguments.b!r} are settings of a pipeline: {missing} is needed as well")
    task = read_task(arguments)
    first, second = (change_task(task, text, compile=arguments.compile) for text in (arguments.a, arguments.b))
    return first, second


def _generate(tasks: tuple[Task, Task], words: tuple[str, str], progress: Progress) -> _Pair:
    """One after the other, so that there is one model in memory at a time."""
    from cogx_fast.pipelines.demo import reads_digits
    from cogx_fast.pipelines.generation import median_step, open_pipeline, run_pipeline
    from cogx_fast.runtime.compiling.compile import watch_compilation
    from cogx_fast.video import quality
    from cogx_fast.video.compare import Side

    quiet_bars()
    pipe, opened = None, None
    sides, settings, seconds, notes = [], [], [], []
    for name, task, word in zip(_NAMES, tasks, words, strict=True):
        if pipe is None or task.setting != opened:
            progress.stage(f"{name}: loading {task.model.name}")
            pipe = None
            gc.collect()  # the other model's memory, before this one's is asked for
            opened, size = task.setting, task.request.size
            pipe = open_pipeline(task.model, opened, device=task.device, size=size, tell=note(progress))
        notes += task.warnings(pipe)
        settings.append(task.facts(pipe))
        with watch_compilation() as compilation:
            steps = progress.steps(f"{name}: denoising", task.request.steps)
            made = run_pipeline(pipe, task.request, on_step=steps)
        assert made.frames is not None
        sides.append(Side(name=name, words="\n".join(part.strip() for part in word.split(",")), frames=made.frames))
        seconds.append(
            {
                "median_step": median_step([made]),
                "first_step": made.first_step,
                "compile": compilation.seconds,
                "total": made.total,
            }
        )
    task = tasks[0]
    request, length = task.request, len(sides[0].frames)
    judge = quality.judge() if reads_digits(task.model.location) else None
    return _Pair(
        sides=(sides[0], sides[1]),
        fps=task.fps,
        title=f"“{request.prompt}”",
        note=" · ".join([task.model.name, str(request.size), f"{task.fps} fps", *_shared(settings)]),
        facts={
            **{"model": task.model.name, "prompt": request.prompt, "negative_prompt": request.negative_prompt},
            "device": str(task.device),
            **{"frames": length, "height": request.size.height, "width": request.size.width, "fps": task.fps},
            "settings": settings,
        },
        seconds=tuple(seconds),
        shows=() if judge is None else tuple(str(judge(side.frames)) for side in sides),
        warnings=tuple(dict.fromkeys(notes)),
    )


def _shared(settings: Sequence[dict[str, Any]]) -> list[str]:
    """What is the same on both sides, in words."""
    first, second = settings
    words = {
        "steps": f"{first['steps']} steps",
        "guidance": f"guidance {first['guidance']:g}",
        "seed": f"seed {first['seed']}",
    }
    return [word for name, word in words.items() if first[name] == second[name]]


# -------------------------------------------------------------------------------------------------------------- results


def _report(found: Comparison) -> dict[str, Any]:
    return {
        "identical": found.psnr_db == float("inf"),
        "psnr_db": finite(found.psnr_db),
        "mean_frame_psnr_db": finite(found.mean_psnr_db),
        "ssim": found.ssim,
        "worst_frame": found.worst,
        "identical_frames": found.identical_frames,
        "per_frame": [{"psnr_db": finite(psnr), "ssim": ssim} for psnr, ssim in found.frames],
        "steadiness": None if found.steadiness is None else list(found.steadiness),
    }


def _render(pair: _Pair, found: Comparison, files: dict[str, Path], words: Sequence[str]) -> str:
    worst_psnr, worst_ssim = found.frames[found.worst]
    quality = [
        ("all frames together", _decibels(found.psnr_db), f"{found.ssim:.4f}"),
        ("mean of the frames", _decibels(found.mean_psnr_db), f"{found.ssim:.4f}"),
        (f"worst frame ({found.worst + 1})", _decibels(worst_psnr), f"{worst_ssim:.4f}"),
    ]
    own: list[tuple[str, ...]] = []
    if pair.seconds:
        own += [
            ("seconds per step (median)", *(_seconds(each["median_step"], "{:.4f}") for each in pair.seconds)),
            ("prompt to first step, seconds", *(_seconds(each["first_step"], "{:.2f}") for each in pair.seconds)),
            ("  of it compiling", *(_seconds(each["compile"], "{:.1f}") for each in pair.seconds)),
            ("prompt to video, seconds", *(_seconds(each["total"], "{:.1f}") for each in pair.seconds)),
        ]
    if found.steadiness is not None:
        own.append(("SSIM of neighbouring frames", *(f"{value:.4f}" for value in found.steadiness)))
    if pair.shows:
        own.append(("shows", *pair.shows))
    lines = [f"{pair.title}: {pair.note}", *(f"{name}  {word}" for name, word in zip(_NAMES, words, strict=True))]
    lines += ["", table(("A and B", "PSNR", "SSIM"), quality)]
    if 0 < found.identical_frames < len(found.frames):
        lines.append(f"Identical are {found.identical_frames} of {len(found.frames)} frames; the mean leaves them out.")
    if own:
        lines += ["", table(("each by itself", *_NAMES), own)]
    if pair.seconds:
        lines.append("One run of each, A first; the median leaves the first step out.")
    names = {"video": "side by side", "contact_sheet": "contact sheet", "plot": "plot"}
    return "\n".join([*lines, "", *(f"{names[key]:<16}{path}" for key, path in files.items())])


def _decibels(value: float) -> str:
    return "identical" if value == float("inf") else f"{value:.1f} dB"


def _seconds(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


__all__ = ["add", "run"]
