"""What the commands' options have in common."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from cogx_fast.config import HUB_IDS

DTYPE_NAMES = ("fp32", "bf16", "fp16")
MODEL_HELP = f"a pipeline directory, a hub id, or one of {', '.join([*HUB_IDS, 'tiny'])}"


class Parser(argparse.ArgumentParser):
    """argparse with errors on one line."""

    def error(self, message: str) -> NoReturn:
        """Say what cannot be parsed, and end."""
        sys.stderr.write(f"error: {message} (see {self.prog} --help)\n")
        raise SystemExit(2)


def add_command(
    commands: Any, name: str, run: Callable[..., Any], summary: str, description: str
) -> argparse.ArgumentParser:
    """A command that ``run(arguments, progress)`` carries out, with the options that all have."""
    command: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=description)
    command.set_defaults(run=run)
    command.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    command.add_argument("--debug", action="store_true", help="show tracebacks and the libraries' own messages")
    return command


def add_sampling(command: argparse.ArgumentParser, *, steps: int) -> None:
    """How to denoise."""
    command.add_argument("--steps", type=count, default=steps, help="denoising steps (default: %(default)s)")
    command.add_argument("--seed", type=seed, default=0, help="of the initial noise (default: %(default)s)")
    command.add_argument(
        "--guidance", type=float, default=6.0, help="how closely to follow the prompt; 1 is off (default: %(default)s)"
    )


def add_video(command: argparse.ArgumentParser) -> None:
    """Everything that one video of any pipeline depends on, but for the model and the prompt."""
    command.add_argument("--negative-prompt", default="", metavar="PROMPT", help="what not to show")
    command.add_argument("--image", metavar="FILE", help="the first frame, for image-to-video models")
    add_sampling(command, steps=50)
    add_size(command)
    command.add_argument("--fps", type=count, help="frames a second (default: 8, for CogVideoX 1.5: 16)")
    add_dtype(command)
    add_running(command, compile_default=None, compile_help="compile the transformer (default: on CUDA)")
    add_offload(command)
    command.add_argument(
        "--attention-plan", metavar="PLAN", help="sparse attention: radial, tiles, or a file of `cogx-fast plan`"
    )
    command.add_argument(
        "--step-cache",
        metavar="CACHE",
        help="skip parts of steps: quality, balanced, fast, teacache:0.2, mask:1,1,0,…, or the file of a schedule",
    )
    command.add_argument(
        "--lora", action="append", default=[], metavar="FILE[=WEIGHT]", help="merge a LoRA file; may be given again"
    )


def add_offload(command: argparse._ActionsContainer) -> None:
    """How a pipeline is laid out on a GPU."""
    command.add_argument(
        "--offload", choices=("none", "model", "blocks", "sequential"),
        help="on a GPU: all there, or each part or each layer only while it computes (default: what its memory allows)",
    )  # fmt: skip
    command.add_argument(
        "--vae-tiling", action=argparse.BooleanOptionalAction,
        help="decode by tiles, one after the other, or with --nproc by all processes (default: on a GPU whose memory "
        "asks for it)",
    )  # fmt: skip


_SIZE = {"frames": "frames", "height": "pixels", "width": "pixels"}


def add_size(command: argparse.ArgumentParser) -> None:
    """What size of video."""
    for name, unit in _SIZE.items():
        command.add_argument(f"--{name}", type=int, help=f"of the video, in {unit} (default: the model's own)")


def read_size(arguments: argparse.Namespace) -> dict[str, int | None]:
    """The size that was asked for, as ``Model.video`` takes it."""
    return {name: getattr(arguments, name) for name in _SIZE}


def add_running(command: argparse.ArgumentParser, *, compile_default: bool | None, compile_help: str) -> None:
    """How and where the transformer runs."""
    command.add_argument("--compile", action=argparse.BooleanOptionalAction, default=compile_default, help=compile_help)
    command.add_argument("--attention", default="auto", help="attention backend (default: %(default)s)")
    add_device(command)


def add_dtype(command: argparse.ArgumentParser) -> None:
    """The dtype of a pipeline's parts."""
    command.add_argument(
        "--dtype", choices=DTYPE_NAMES, help="default: as the weights are stored; fp32 on a CPU that lacks theirs"
    )


def add_device(command: argparse.ArgumentParser) -> None:
    """Where to compute."""
    command.add_argument("--device", help="cpu, cuda, cuda:1, … (default: cuda where there is one)")


def count(text: str) -> int:
    """A whole number, 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number, 1 or more")
    return int(text)


def seed(text: str) -> int:
    """A seed."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number from 0 to 2⁶³ - 1")
    return int(text)


__all__ = [
    "DTYPE_NAMES", "MODEL_HELP", "Parser", "add_command", "add_device", "add_dtype", "add_offload", "add_running",
    "add_sampling", "add_size", "add_video", "count", "read_size", "seed",
]  # fmt: skip
