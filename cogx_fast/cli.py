"""The command ``cogx-fast``: demo, generate, info.

Results go to stdout (with ``--json`` exactly one JSON object), everything else to stderr. Exit status: 0 done, 1
failed, 2 asked for something that cannot be, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from cogx_fast import __version__
from cogx_fast.config import HUB_IDS, PRESETS
from cogx_fast.optional import MissingDependencyError, require
from cogx_fast.terminal import Progress

if TYPE_CHECKING:
    import torch

    from cogx_fast.generation import Run

_DTYPE_NAMES = ("fp32", "bf16", "fp16")
_DEMO_PROMPT = "a seven moving left"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments, or None for the process's own.

    Returns:
        The exit status.
    """
    parser = _parser()
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as stop:  # argparse's way out of --help and of what it cannot parse
        return int(stop.code or 0)
    progress = Progress()
    try:
        with _quiet_libraries(debug=arguments.debug):
            report, text = arguments.run(arguments, progress)
    except KeyboardInterrupt:
        progress.clear()
        return _fail("interrupted", 130, debug=False)
    except (ValueError, OSError, MissingDependencyError) as error:
        progress.clear()
        return _fail(_one_line(error), 2, debug=arguments.debug)
    except Exception as error:  # noqa: BLE001  # whatever it is, the user gets a line and, asked for, the traceback
        progress.clear()
        hint = "" if arguments.debug else " (--debug shows where)"
        return _fail(f"{type(error).__name__}: {_one_line(error)}{hint}", 1, debug=arguments.debug)
    progress.clear()
    print(json.dumps(report, ensure_ascii=False) if arguments.json else text)
    return 0


# ------------------------------------------------------------------------------------------------------------ commands


def _demo(arguments: argparse.Namespace, progress: Progress) -> tuple[dict[str, Any], str]:
    from cogx_fast.config import TransformerConfig
    from cogx_fast.costs import default_video
    from cogx_fast.demo import OURS, UPSTREAM, render, run_demo
    from cogx_fast.generation import DTYPES, Request, choose_device

    _quiet_bars()
    device, dtype = choose_device(arguments.device), DTYPES[arguments.dtype]
    request = Request(
        prompt=arguments.prompt,
        size=default_video(TransformerConfig.preset("tiny")),
        steps=arguments.steps,
        seed=arguments.seed,
        guidance=arguments.guidance,
    )
    result = run_demo(
        request,
        out=arguments.out,
        dtype=dtype,
        device=device,
        attention=arguments.attention,
        compile=arguments.compile,
        rounds=arguments.rounds,
        progress=progress,
    )
    _warn(result.warnings, progress)
    identical = result.psnr_db == float("inf")
    report = {
        "prompt": request.prompt,
        "seed": request.seed,
        "steps": request.steps,
        "rounds": result.rounds,
        "device": str(device),
        "dtype": arguments.dtype,
        "compiled": arguments.compile,
        "seconds_per_step": {
            "diffusers": result.seconds_per_step[UPSTREAM],
            "cogx_fast": result.seconds_per_step[OURS],
        },
        "ratio": result.ratio,
        "first_step_seconds": {"diffusers": result.first_step[UPSTREAM], "cogx_fast": result.first_step[OURS]},
        "compile_seconds": result.compile_seconds,
        "graphs": result.graphs,
        "breaks": result.breaks,
        "recompiles": result.recompiles,
        "psnr_db": None if identical else result.psnr_db,  # JSON has no infinity
        "identical": identical,
        "files": {name: str(path) for name, path in result.files.items()},
        "warnings": list(result.warnings),
    }
    return report, render(result, request, dtype=dtype, device=device, compile=arguments.compile)


def _generate(arguments: argparse.Namespace, progress: Progress) -> tuple[dict[str, Any], str]:
    from cogx_fast import generation, video
    from cogx_fast.costs import choose_video
    from cogx_fast.locate import locate_pipeline
    from cogx_fast.runtime.compile import watch_compilation

    out = video.check_writable(arguments.out, ".mp4")
    require("imageio_ffmpeg", why="to write videos")
    model = locate_pipeline(arguments.model)
    generation.check_pipeline(model, with_image=arguments.image is not None)
    size = choose_video(
        model.config,
        frames=arguments.frames,
        height=arguments.height,
        width=arguments.width,
        spatial_factor=model.spatial_factor,
    )
    device = generation.choose_device(arguments.device)
    dtype = None if arguments.dtype is None else generation.DTYPES[arguments.dtype]
    image = None if arguments.image is None else generation.read_image(arguments.image)
    compiled = device.type == "cuda" if arguments.compile is None else arguments.compile

    _quiet_bars()
    progress.stage(f"loading {arguments.model}")
    begin = time.perf_counter()
    pipe = generation.open_pipeline(model, dtype=dtype, device=device, attention=arguments.attention, compile=compiled)
    load_seconds = time.perf_counter() - begin
    notes = [
        generation.length_warning(model.config, size),
        generation.overflow_warning(model.config, pipe.transformer.dtype),
        generation.truncation_warning(pipe, arguments.prompt),
    ]
    _warn(tuple(filter(None, notes)), progress)
    request = generation.Request(
        prompt=arguments.prompt,
        negative_prompt=arguments.negative_prompt,
        size=size,
        steps=arguments.steps,
        seed=arguments.seed,
        guidance=arguments.guidance,
        image=image,
    )
    with watch_compilation() as compilation:
        run = generation.run_pipeline(pipe, request, on_step=progress.steps("denoising", request.steps))
    progress.stage("writing the video")
    assert run.frames is not None
    fps = arguments.fps or (8 if model.config.patch_size_t is None else 16)
    video.write_video(out, run.frames, fps=fps)
    report = {
        "out": str(out),
        **{"model": arguments.model, "pipeline_class": model.pipeline_class},
        **{"prompt": request.prompt, "negative_prompt": request.negative_prompt, "guidance": request.guidance},
        **{"seed": request.seed, "steps": request.steps},
        **{"frames": len(run.frames), "height": size.height, "width": size.width, "fps": fps},
        **{"device": str(device), "dtype": _name_dtype(pipe.transformer.dtype), "compiled": compiled},
        "seconds": _seconds(run, load_seconds, compilation.seconds),
        **{"graphs": compilation.graphs, "breaks": compilation.breaks, "recompiles": compilation.recompiles},
        "warnings": list(filter(None, notes)),
    }
    return report, _render_generated(report)


def _info(arguments: argparse.Namespace, progress: Progress) -> tuple[dict[str, Any], str]:
    from cogx_fast.info import describe, render
    from cogx_fast.locate import locate

    model = locate(arguments.model)
    facts = describe(
        model, frames=arguments.frames, height=arguments.height, width=arguments.width, batch=arguments.batch
    )
    return facts, render(facts)


def _seconds(run: Run, load: float, compiling: float) -> dict[str, float | None]:
    from cogx_fast.generation import median_step

    return {
        "load": load,
        "total": run.total,
        "first_step": run.first_step,
        "median_step": median_step([run]),
        "compile": compiling,
    }


def _render_generated(report: dict[str, Any]) -> str:
    from cogx_fast.costs import VideoSize

    seconds = report["seconds"]
    size = VideoSize(frames=report["frames"], height=report["height"], width=report["width"])
    steps = f"{report['steps']} step" + ("s" if report["steps"] != 1 else "")
    if seconds["median_step"] is not None:
        steps += f" of {seconds['median_step']:.3g} s (prompt to first step {seconds['first_step']:.3g} s)"
    compiled = f", compiled in {seconds['compile']:.1f} s" if report["compiled"] else ""
    return (
        f"{report['out']}: {size}, {report['fps']} fps\n"
        f"{seconds['total']:.1f} s: {steps}, {report['dtype']} on {report['device']}{compiled}; "
        f"loading took {seconds['load']:.1f} s"
    )


def _name_dtype(dtype: torch.dtype) -> str:
    from cogx_fast.generation import DTYPES

    return next((name for name, known in DTYPES.items() if known == dtype), str(dtype).removeprefix("torch."))


# ------------------------------------------------------------------------------------------------------------- parsing


class _Parser(argparse.ArgumentParser):
    """argparse with errors on one line."""

    def error(self, message: str) -> NoReturn:
        sys.stderr.write(f"error: {message} (see {self.prog} --help)\n")
        raise SystemExit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="cogx-fast", description="A fast CogVideoX video transformer for PyTorch.")
    parser.add_argument("--version", action="version", version=f"cogx-fast {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="{demo,generate,info}")
    _add_demo(commands)
    _add_generate(commands)
    _add_info(commands)
    return parser


def _add_demo(commands: Any) -> None:
    command = _command(
        commands, "demo", _demo, "make a small video with diffusers and with cogx_fast and compare them",
        "Generate one video twice with the tiny pipeline that comes with the package: with diffusers' transformer and "
        "with this package's, compiled. Writes both videos and a contact sheet; prints times and how far they differ.",
    )  # fmt: skip
    command.add_argument("--prompt", default=_DEMO_PROMPT, help="what to show (default: %(default)r)")
    command.add_argument("--out", default="out/demo", metavar="DIR", help="where to write (default: %(default)s)")
    command.add_argument("--rounds", type=_count, default=3, help="timed runs of each, in turns (default: %(default)s)")
    command.add_argument("--dtype", choices=_DTYPE_NAMES, default="fp32", help="default: %(default)s")
    _add_sampling(command, steps=25)
    _add_running(command, compile_default=True, compile_help="compile the transformer (default)")


def _add_generate(commands: Any) -> None:
    command = _command(
        commands, "generate", _generate, "make a video with any CogVideoX pipeline",
        "Generate a video with a CogVideoX pipeline whose transformer is replaced by this package's.",
    )  # fmt: skip
    command.add_argument(
        "--model",
        required=True,
        help=f"a pipeline directory, a hub id, or one of {', '.join([*HUB_IDS, 'tiny'])}",
    )
    command.add_argument("--prompt", required=True, help="what to show")
    command.add_argument("--out", required=True, metavar="FILE.mp4", help="the video to write")
    command.add_argument("--negative-prompt", default="", metavar="PROMPT", help="what not to show")
    command.add_argument("--image", metavar="FILE", help="the first frame, for image-to-video models")
    _add_sampling(command, steps=50)
    _add_size(command)
    command.add_argument("--fps", type=_count, help="frames a second (default: 8, for CogVideoX 1.5: 16)")
    command.add_argument("--dtype", choices=_DTYPE_NAMES, help="default: as the weights are stored")
    _add_running(command, compile_default=None, compile_help="compile the transformer (default: on CUDA)")


def _add_info(commands: Any) -> None:
    command = _command(
        commands, "info", _info, "say what a model is and what a step costs, without loading weights",
        "Configuration, parameters by part, memory by dtype, tokens and operations of one denoising step.",
    )  # fmt: skip
    command.add_argument(
        "model",
        metavar="MODEL",
        help="a pipeline or transformer directory, its config.json, a .safetensors file beside one, a hub id, or one "
        f"of {', '.join(PRESETS)}",
    )
    _add_size(command)
    command.add_argument(
        "--batch", type=_count, default=2, help="videos in one call; guidance doubles them (default: %(default)s)"
    )


def _command(
    commands: Any, name: str, run: Callable[..., Any], summary: str, description: str
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=description)
    command.set_defaults(run=run)
    command.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    command.add_argument("--debug", action="store_true", help="show tracebacks and the libraries' own messages")
    return command


def _add_sampling(command: argparse.ArgumentParser, *, steps: int) -> None:
    command.add_argument("--steps", type=_count, default=steps, help="denoising steps (default: %(default)s)")
    command.add_argument("--seed", type=_seed, default=0, help="of the initial noise (default: %(default)s)")
    command.add_argument(
        "--guidance", type=float, default=6.0, help="how closely to follow the prompt; 1 is off (default: %(default)s)"
    )


def _add_size(command: argparse.ArgumentParser) -> None:
    for name, unit in (("frames", "frames"), ("height", "pixels"), ("width", "pixels")):
        command.add_argument(f"--{name}", type=int, help=f"of the video, in {unit} (default: the model's own)")


def _add_running(command: argparse.ArgumentParser, *, compile_default: bool | None, compile_help: str) -> None:
    command.add_argument("--compile", action=argparse.BooleanOptionalAction, default=compile_default, help=compile_help)
    command.add_argument("--attention", default="auto", help="attention backend (default: %(default)s)")
    command.add_argument("--device", help="cpu, cuda, cuda:1, … (default: cuda where there is one)")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number, 1 or more")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number from 0 to 2⁶³ - 1")
    return int(text)


# -------------------------------------------------------------------------------------------------------------- output


def _warn(notes: Sequence[str], progress: Progress) -> None:
    progress.clear()
    for note in notes:
        print(f"warning: {note}", file=sys.stderr)


def _fail(message: str, status: int, *, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)
    return status


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def _quiet_libraries(*, debug: bool) -> Iterator[None]:
    """Keep what other libraries log and warn of off the terminal; our own warnings are shown as lines."""
    if debug:
        yield
        return
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)

    def show(message: Warning | str, category: type[Warning], filename: str, *_: Any, **__: Any) -> None:
        if Path(filename).is_relative_to(Path(__file__).parent):
            print(f"warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        try:
            yield
        finally:
            logging.disable(before)


def _quiet_bars() -> None:
    """Loading bars off: the command line has its own, and none where stderr is no terminal."""
    for library in ("diffusers", "transformers"):
        require(library, why="to run pipelines")
        require(f"{library}.utils.logging", why="to run pipelines").disable_progress_bar()
