"""The demo: the tiny pipeline from prompt to video, with diffusers' transformer beside this package's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cogx_fast.assets import CHECKSUMS
from cogx_fast.extras import require
from cogx_fast.model.cpu import has_int8_products
from cogx_fast.pipelines.generation import (
    UPSTREAM,
    Request,
    Run,
    Setting,
    median_step,
    open_pipeline,
    run_pipeline,
    truncation_warning,
)
from cogx_fast.pipelines.locate import locate_pipeline
from cogx_fast.runtime.compiling.compile import CompilationStats, watch_compilation
from cogx_fast.terminal import Progress, table
from cogx_fast.video import quality
from cogx_fast.video.compare import check_dependencies
from cogx_fast.video.files import check_directory, contact_sheet, write_image, write_video
from cogx_fast.video.plots import Point, plot_speed

FPS = 8
_FILE_NAMES = {"contact_sheet": "contact sheet", "plot": "plot"}


@dataclass(frozen=True, kw_only=True)
class Column:
    """What the demo found for one way to make the video; times in seconds."""

    name: str
    setting: Setting
    seconds_per_step: float
    """Median denoising step over ``rounds`` alternating runs, without each run's first step."""
    first_step: float
    """From the prompt to the end of the first denoising step, in the first run: text encoder and compilation in it."""
    compile_seconds: float
    graphs: int
    breaks: int
    recompiles: int
    psnr_db: float
    """To the first column's video, before they were written; infinite if they are equal."""
    ssim: float
    shows: str | None
    """What the judge reads in the video; None where the tiny pipeline is not trained."""
    video: Path

    def ratio(self, reference: Column) -> float:
        """This step over the reference's step."""
        return self.seconds_per_step / reference.seconds_per_step


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """What the demo found."""

    columns: tuple[Column, ...]
    """The first is the reference: diffusers."""
    rounds: int
    files: Mapping[str, Path]
    """The pictures."""
    warnings: tuple[str, ...]


def settings(*, dtype: torch.dtype, attention: str = "auto", compile: bool = True) -> dict[str, Setting]:
    """The ways to make the video, by name; the first is what the others are compared with."""
    ours = Setting(dtype=dtype, attention=attention, compile=compile)
    columns = {"diffusers": Setting(transformer=UPSTREAM, dtype=dtype), "cogx_fast": ours}
    if compile:  # eager it is slow
        columns["cogx_fast, int8"] = dataclasses.replace(ours, quant="int8-dynamic")
    return columns


def run_demo(
    request: Request,
    columns: Mapping[str, Setting],
    *,
    out: str | Path,
    device: torch.device,
    rounds: int = 3,
    progress: Progress | None = None,
) -> DemoResult:
    """Generate the same video in several ways, time their steps in turns, and write videos, contact sheet and plot.

    Args:
        request: what to generate; at least 2 steps.
        columns: the ways, the reference first (``settings``).
        out: directory for the files.
        device: where to run.
        rounds: timed runs of each, alternating, after one warm-up run of each.
        progress: where to show how far it is.

    Raises:
        MissingDependencyError: an optional package is not installed: the demo needs all of ``cogx-fast[all]``.
        OSError: ``out`` cannot be written, or the tiny pipeline is damaged.
    """
    if request.steps < 2:
        raise ValueError(f"steps is {request.steps}, expected 2 or more: the first step compiles and is not timed")
    progress = progress or Progress()
    out = check_directory(out)
    check_dependencies()
    progress.stage("loading the tiny pipeline")
    model = locate_pipeline("tiny")
    read = _reader(model.location)
    pipes = {name: open_pipeline(model, setting, device=device) for name, setting in columns.items()}
    stats: dict[str, list[CompilationStats]] = {name: [] for name in columns}

    def run(name: str, text: str, *, decode: bool) -> Run:
        with watch_compilation() as watched:
            steps = progress.steps(f"{name}: {text}", request.steps)
            done = run_pipeline(pipes[name], request, decode=decode, on_step=steps)
        stats[name].append(watched)
        return done

    first = {
        name: run(name, "compiling, video" if each.compile else "video", decode=True) for name, each in columns.items()
    }
    timed: dict[str, list[Run]] = {name: [] for name in columns}
    for number in range(rounds):
        for name, runs in timed.items():
            runs.append(run(name, f"timing, run {number + 1} of {rounds}", decode=False))
    progress.stage("comparing and writing files")
    videos = {name: _known(each.frames) for name, each in first.items()}
    reference = next(iter(videos.values()))
    found = tuple(
        Column(
            name=name,
            setting=setting,
            seconds_per_step=_known(median_step(timed[name])),
            first_step=first[name].first_step,
            psnr_db=quality.psnr(videos[name], reference),
            ssim=quality.ssim(videos[name], reference),
            shows=None if read is None else str(read(videos[name])),
            video=out / f"{name.replace(', ', '-')}.mp4",
            **_total(stats[name]),
        )
        for name, setting in columns.items()
    )
    notes = filter(None, [truncation_warning(next(iter(pipes.values())), request.prompt)])
    files = {"contact_sheet": out / "contact_sheet.png", "plot": out / "speed.png"}
    result = DemoResult(columns=found, rounds=rounds, files=files, warnings=tuple(notes))
    for column in found:
        write_video(column.video, videos[column.name], fps=FPS)
    _draw(result, request, videos, device)
    progress.clear()
    return result


def render(result: DemoResult, request: Request, *, device: torch.device) -> str:
    """The closing table and where the files are."""
    columns, reference = result.columns, result.columns[0]

    def compiled(value: str, column: Column) -> str:
        return value if column.setting.compile else "–"

    rows = [
        ("seconds per step (median)", *(f"{column.seconds_per_step:.4f}" for column in columns)),
        ("ratio to diffusers", *(f"{column.ratio(reference):.2f}" for column in columns)),
        ("prompt to first step, seconds", *(f"{column.first_step:.4f}" for column in columns)),
        ("  of it compiling", *(compiled(f"{column.compile_seconds:.1f}", column) for column in columns)),
        ("graphs", *(compiled(str(column.graphs), column) for column in columns)),
        ("graph breaks", *(compiled(str(column.breaks), column) for column in columns)),
        ("recompiles", *(compiled(str(column.recompiles), column) for column in columns)),
        ("PSNR to diffusers' video", "–", *(_decibels(column.psnr_db) for column in columns[1:])),
        ("SSIM to diffusers' video", "–", *(f"{column.ssim:.4f}" for column in columns[1:])),
    ]
    if reference.shows is not None:
        rows.append(("shows", *(str(column.shows) for column in columns)))
    places = [(column.name, column.video) for column in columns]
    places += [(_FILE_NAMES[key], path) for key, path in result.files.items()]
    width = 3 + max(len(name) for name, _ in places)
    timed = result.rounds * (request.steps - 1)
    return "\n".join(
        [
            f"“{request.prompt}”: {request.size}, {request.steps} steps, seed {request.seed}, "
            f"{_where(reference.setting, device)}",
            "",
            table(("", *(column.name for column in columns)), rows),
            "",
            f"A step is one denoising step with guidance (batch 2). Medians of {timed} steps each: {result.rounds} "
            "run" + ("s" if result.rounds != 1 else "") + " of each in turns",
            "after a warm-up run of each, without the first step of every run.",
            *_why_int8_is_slow(columns, device),
            "",
            *(f"{name:<{width}}{path}" for name, path in places),
        ]
    )  # fmt: skip


def _why_int8_is_slow(columns: Sequence[Column], device: torch.device) -> list[str]:
    if device.type != "cpu" or not any(column.setting.quant and column.ratio(columns[0]) > 1 for column in columns):
        return []
    if not has_int8_products():
        return ["int8 is for GPUs: this CPU has no AVX512-VNNI, so its int8 values are multiplied in fp32, exactly."]
    return ["int8 is for GPUs and wide models: at this width quantizing costs more than its faster products save."]


def reads_digits(location: str | None) -> bool:
    """Whether this pipeline is the trained tiny one, whose videos the judge can read."""
    return location is not None and (Path(location) / CHECKSUMS).is_file()


def _total(stats: Sequence[CompilationStats]) -> dict[str, Any]:
    """What all runs of one way compiled, as fields of its column."""
    return {
        "compile_seconds": sum(each.seconds for each in stats),
        "graphs": sum(each.graphs for each in stats),
        "breaks": sum(each.breaks for each in stats),
        "recompiles": sum(each.recompiles for each in stats),
    }


def _reader(location: str | None) -> quality.Judge | None:
    if not reads_digits(location):
        return None
    require("sklearn.svm", why="to judge videos of digits")
    return quality.judge()


def _draw(result: DemoResult, request: Request, videos: Mapping[str, Any], device: torch.device) -> None:
    columns, reference = result.columns, result.columns[0]
    rows = [(column.name, "\n".join(_words(column, reference)), videos[column.name]) for column in columns]
    note = (
        f"{request.size} · {request.steps} steps · seed {request.seed} · {_where(reference.setting, device)} · "
        "PSNR and ratio to diffusers"
    )
    sheet = contact_sheet(rows, title=f"“{request.prompt}”", note=note, fps=FPS)
    write_image(result.files["contact_sheet"], sheet)
    points = [
        Point(name=column.name, steps_per_second=1 / column.seconds_per_step, psnr_db=column.psnr_db)
        for column in columns
    ]
    title = f"The tiny pipeline, {_where(reference.setting, device)}"
    write_image(result.files["plot"], plot_speed(points[1:], reference=points[0], title=title))


def _words(column: Column, reference: Column) -> Sequence[str]:
    milliseconds = 1000 * column.seconds_per_step
    lines = [f"{milliseconds:.{1 if milliseconds < 100 else 0}f} ms a step"]
    if column is not reference:
        lines[0] += f" (ratio {column.ratio(reference):.2f})"
        lines.append("identical" if column.psnr_db == float("inf") else f"PSNR {column.psnr_db:.1f} dB")
    if column.shows is not None:
        lines.append(f"shows {column.shows}")
    return lines


def _where(setting: Setting, device: torch.device) -> str:
    name = str(setting.dtype).removeprefix("torch.")
    if device.type == "cpu":
        return f"{name} on cpu ({torch.get_num_threads()} threads)"
    return f"{name} on {torch.cuda.get_device_name(device)}" if device.type == "cuda" else f"{name} on {device}"


def _decibels(value: float) -> str:
    return "identical (inf dB)" if value == float("inf") else f"{value:.1f} dB"


def _known(value: Any) -> Any:
    assert value is not None  # at least 2 steps and 1 round, decoded
    return value


__all__ = ["FPS", "Column", "DemoResult", "reads_digits", "render", "run_demo", "settings"]
