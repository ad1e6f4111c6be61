"""The demo: the tiny pipeline from prompt to video, with diffusers' transformer beside this package's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cogx_fast.assets import tiny_pipeline_dir
from cogx_fast.generation import Request, Run, median_step, quiet, run_pipeline, truncation_warning
from cogx_fast.optional import require
from cogx_fast.terminal import Progress, table
from cogx_fast.video import check_directory, contact_sheet, psnr, write_image, write_video

FPS = 8
UPSTREAM, OURS = "diffusers", "cogx_fast"
_FILE_NAMES = {"video": "video", "upstream_video": "diffusers' video", "contact_sheet": "contact sheet"}


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """What the demo found; times in seconds."""

    seconds_per_step: dict[str, float]
    """Median denoising step of each, over ``rounds`` alternating runs, without each run's first step."""
    first_step: dict[str, float]
    """From the prompt to the end of the first denoising step, in the first run: text encoder and compilation in it."""
    compile_seconds: float
    graphs: int
    breaks: int
    recompiles: int
    psnr_db: float
    """Between the two videos before they were written; infinite if they are equal."""
    rounds: int
    files: dict[str, Path]
    warnings: tuple[str, ...]

    @property
    def ratio(self) -> float:
        """Our step over diffusers' step."""
        return self.seconds_per_step[OURS] / self.seconds_per_step[UPSTREAM]


def run_demo(
    request: Request,
    *,
    out: str | Path,
    dtype: torch.dtype,
    device: torch.device,
    attention: str = "auto",
    compile: bool = True,
    rounds: int = 3,
    progress: Progress | None = None,
) -> DemoResult:
    """Generate the same video with both transformers, time their steps in turns, and write videos and contact sheet.

    Args:
        request: what to generate; at least 2 steps.
        out: directory for the files.
        dtype: of all parts of both pipelines.
        device: where to run.
        attention: attention backend of this package's transformer.
        compile: compile it.
        rounds: timed runs of each, alternating, after one warm-up run of each.
        progress: where to show how far it is.

    Raises:
        MissingDependencyError: diffusers, transformers, imageio-ffmpeg or pillow is not installed.
        OSError: ``out`` cannot be written.
    """
    from cogx_fast.runtime.compile import watch_compilation

    if request.steps < 2:
        raise ValueError(f"steps is {request.steps}, expected 2 or more: the first step compiles and is not timed")
    progress = progress or Progress()
    out = check_directory(out)
    for module in ("imageio_ffmpeg", "PIL.Image"):
        require(module, why="to write videos and pictures")
    progress.stage("loading the tiny pipeline")
    pipes = _open_both(dtype=dtype, device=device, attention=attention, compile=compile)

    def run(name: str, text: str, decode: bool) -> Run:
        return run_pipeline(
            pipes[name], request, decode=decode, on_step=progress.steps(f"{name}: {text}", request.steps)
        )

    with watch_compilation() as compilation:
        first = {
            UPSTREAM: run(UPSTREAM, "video", decode=True),
            OURS: run(OURS, "compiling, video" if compile else "video", decode=True),
        }
        timed: dict[str, list[Run]] = {UPSTREAM: [], OURS: []}
        for number in range(rounds):
            for name, runs in timed.items():
                runs.append(run(name, f"timing, run {number + 1} of {rounds}", decode=False))
    progress.stage("writing files")
    upstream_frames, our_frames = first[UPSTREAM].frames, first[OURS].frames
    assert upstream_frames is not None
    assert our_frames is not None
    result = DemoResult(
        seconds_per_step={name: _known(median_step(runs)) for name, runs in timed.items()},
        first_step={name: each.first_step for name, each in first.items()},
        compile_seconds=compilation.seconds,
        graphs=compilation.graphs,
        breaks=compilation.breaks,
        recompiles=compilation.recompiles,
        psnr_db=psnr(our_frames, upstream_frames),
        rounds=rounds,
        files={
            "video": out / f"{OURS}.mp4",
            "upstream_video": out / f"{UPSTREAM}.mp4",
            "contact_sheet": out / "contact_sheet.png",
        },
        warnings=tuple(filter(None, [truncation_warning(pipes[OURS], request.prompt)])),
    )
    write_video(result.files["video"], our_frames, fps=FPS)
    write_video(result.files["upstream_video"], upstream_frames, fps=FPS)
    frames = {UPSTREAM: upstream_frames, OURS: our_frames}
    rows = [(name, _milliseconds(result.seconds_per_step[name]) + " a step", frames[name]) for name in pipes]
    title = f"“{request.prompt}”"
    sheet = contact_sheet(rows, title=title, note=_sheet_note(request, result, dtype, device), fps=FPS)
    write_image(result.files["contact_sheet"], sheet)
    progress.clear()
    return result


def render(result: DemoResult, request: Request, *, dtype: torch.dtype, device: torch.device, compile: bool) -> str:
    """The closing table and where the files are."""
    step, first = result.seconds_per_step, result.first_step

    def both(name: str, values: dict[str, float]) -> tuple[str, str, str]:
        return name, f"{values[UPSTREAM]:.4f}", f"{values[OURS]:.4f}"

    rows = [
        both("seconds per step (median)", step),
        ("ratio to diffusers", "1.00", f"{result.ratio:.2f}"),
        both("prompt to first step, seconds", first),
        ("  of it compiling", "–", f"{result.compile_seconds:.1f}" if compile else "not compiled"),
        ("graphs", "–", str(result.graphs)),
        ("graph breaks", "–", str(result.breaks)),
        ("recompiles", "–", str(result.recompiles)),
        ("PSNR to diffusers' video", "–", _decibels(result.psnr_db)),
    ]
    timed = result.rounds * (request.steps - 1)
    return "\n".join(
        [
            f"“{request.prompt}”: {request.size}, {request.steps} steps, seed {request.seed}, {_where(dtype, device)}",
            "",
            table(("", UPSTREAM, OURS), rows),
            "",
            f"A step is one denoising step with guidance (batch 2). Medians of {timed} steps each: {result.rounds} "
            "run" + ("s" if result.rounds != 1 else "") + " of each in turns",
            "after a warm-up run of each, without the first step of every run.",
            "",
            *(f"{name:<18}{result.files[key]}" for key, name in _FILE_NAMES.items()),
        ]
    )  # fmt: skip


def _open_both(*, dtype: torch.dtype, device: torch.device, attention: str, compile: bool) -> dict[str, Any]:
    diffusers = require("diffusers", why="to run pipelines")
    require("transformers", why="to run pipelines")
    from cogx_fast.loading import load

    directory = tiny_pipeline_dir()
    upstream = diffusers.CogVideoXPipeline.from_pretrained(directory, torch_dtype=dtype).to(device)
    ours = diffusers.CogVideoXPipeline.from_pretrained(
        directory,
        transformer=load(directory / "transformer", dtype=dtype, device=device, attention=attention, compile=compile),
        torch_dtype=dtype,
    ).to(device)
    return {UPSTREAM: quiet(upstream), OURS: quiet(ours)}


def _sheet_note(request: Request, result: DemoResult, dtype: torch.dtype, device: torch.device) -> str:
    return (
        f"{request.size} · {request.steps} steps · seed {request.seed} · {_where(dtype, device)} · "
        f"ratio of a step {result.ratio:.2f} · PSNR {_decibels(result.psnr_db)}"
    )


def _where(dtype: torch.dtype, device: torch.device) -> str:
    name = str(dtype).removeprefix("torch.")
    if device.type == "cpu":
        return f"{name} on cpu ({torch.get_num_threads()} threads)"
    return f"{name} on {torch.cuda.get_device_name(device)}" if device.type == "cuda" else f"{name} on {device}"


def _decibels(value: float) -> str:
    return "identical (inf dB)" if value == float("inf") else f"{value:.1f} dB"


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"


def _known(value: float | None) -> float:
    assert value is not None  # at least 2 steps and 1 round
    return value


__all__ = ["OURS", "UPSTREAM", "DemoResult", "render", "run_demo"]
