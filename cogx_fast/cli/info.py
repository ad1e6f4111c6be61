"""``cogx-fast info``: what a model is and costs, from its configuration."""

from __future__ import annotations

import argparse
from typing import Any

from cogx_fast.cli.arguments import add_command, add_size, count
from cogx_fast.config import PRESETS
from cogx_fast.terminal import Progress


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = add_command(
        commands, "info", run, "say what a model is and what a step costs, without loading weights",
        "Configuration, parameters by part, memory by dtype, tokens and operations of one denoising step.",
    )  # fmt: skip
    command.add_argument(
        "model",
        metavar="MODEL",
        help="a pipeline or transformer directory, its config.json, a .safetensors file beside one, a hub id, or one "
        f"of {', '.join(PRESETS)}",
    )
    add_size(command)
    command.add_argument(
        "--batch", type=count, default=2, help="videos in one call; guidance doubles them (default: %(default)s)"
    )


def run(arguments: argparse.Namespace, progress: Progress) -> tuple[dict[str, Any], str]:
    """Carry it out: the report, and its text."""
    from cogx_fast.info import describe, render
    from cogx_fast.pipelines.locate import locate

    model = locate(arguments.model)
    facts = describe(
        model, frames=arguments.frames, height=arguments.height, width=arguments.width, batch=arguments.batch
    )
    return facts, render(facts)


__all__ = ["add", "run"]
