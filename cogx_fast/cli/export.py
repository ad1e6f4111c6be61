"""``cogx-fast export``: a model's blocks compiled ahead of time, in one file that needs no compiler."""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogx_fast.cli.arguments import DTYPE_NAMES, add_command, count
from cogx_fast.terminal import Progress, scaled, table

if TYPE_CHECKING:
    from cogx_fast.config import TransformerConfig
    from cogx_fast.runtime.packages.package import SizeRange

_SIZE = re.compile(r"(\d+)[x×](\d+)[x×](\d+)")


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = add_command(
        commands, "export", run, "compile a model ahead of time into one file, without its weights",
        "Compiles the transformer's blocks for a range of sizes. cogx_fast.load_package(FILE, weights) runs them with "
        "any weights of that configuration, without a compiler. The file holds executable code.",
    )  # fmt: skip
    command.add_argument(
        "model",
        metavar="MODEL",
        help='a pipeline or transformer directory, a .safetensors file beside its config.json, a hub id, or "tiny"',
    )
    command.add_argument("--out", required=True, metavar="FILE", help="the package, e.g. m.pt2")
    command.add_argument(
        "--sizes",
        metavar="FxHxW,…",
        help="videos, as frames × height × width in pixels: the package is for every size from the smallest to the "
        "largest (default: any up to the model's own)",
    )
    command.add_argument(
        "--batch", type=count, default=4, help="most videos in one call; guidance doubles them (default: %(default)s)"
    )
    command.add_argument("--recipe", help="quantize: the name of a recipe that comes along, or a .toml file")
    command.add_argument("--dtype", choices=DTYPE_NAMES, help="default: as the weights are stored")
    command.add_argument("--attention", default="auto", help="attention backend (default: %(default)s)")
    command.add_argument("--device", default="cpu", help="cpu, cuda, … (default: %(default)s)")


def run(arguments: argparse.Namespace, progress: Progress) -> tuple[dict[str, Any], str]:
    """Carry it out: the report, and its text."""
    from cogx_fast.loading import load_weights
    from cogx_fast.runtime.module import CogVideoXModel
    from cogx_fast.runtime.packages.export import export_package

    out = Path(arguments.out)
    if not out.parent.is_dir():
        raise ValueError(f"{out.parent}: no such directory: make it, or give another --out")
    progress.stage("loading")
    model = load_weights(
        arguments.model,
        CogVideoXModel,
        attention=arguments.attention,
        compiled=True,
        dtype=arguments.dtype,
        device=arguments.device,
        quant=arguments.recipe,
    )
    sizes = read_sizes(arguments.sizes, arguments.batch, model.config)
    began = time.perf_counter()
    manifest = export_package(
        model,
        out,
        sizes,
        on_kind=lambda done, total: progress.stage(f"compiling block {done + 1} of {total} kinds"),
    )
    report = {
        "file": str(out),
        "bytes": out.stat().st_size,
        "seconds": time.perf_counter() - began,
        "recipe": arguments.recipe,
        "kinds": len(set(manifest["blocks"].values())),
        **{key: manifest[key] for key in ("versions", "device", "config_hash", "dtype", "attention", "sizes")},
    }
    return report, _render(report)


def read_sizes(text: str | None, batch: int, config: TransformerConfig) -> SizeRange:
    """The range of ``--sizes``, e.g. "17x256x256,49x480x720".

    Raises:
        ValueError: it is not written so, or the model cannot make a video of that size.
    """
    from cogx_fast.runtime.packages.package import SizeRange
    from cogx_fast.sizes import choose_video, count_tokens

    if text is None:
        own = count_tokens(config, choose_video(config))
        return SizeRange(tokens=(2, own.text + own.video), batch=batch)
    tokens = []
    for item in text.split(","):
        match = _SIZE.fullmatch(item.strip())
        if match is None:
            raise ValueError(
                f"--sizes: got {item!r}, expected FRAMESxHEIGHTxWIDTH in frames and pixels, e.g. 49x480x720"
            )
        frames, height, width = map(int, match.groups())
        tokens.append(count_tokens(config, choose_video(config, frames=frames, height=height, width=width)))
    fewest = min(size.video for size in tokens) + 1  # a prompt may be as short as one token
    return SizeRange(tokens=(fewest, max(size.text + size.video for size in tokens)), batch=batch)


def _render(report: dict[str, Any]) -> str:
    fewest, most = report["sizes"]["tokens"]
    rows = [
        ("file", report["file"]),
        ("size", scaled(report["bytes"], "B")),
        ("compiled in", f"{report['seconds']:.1f} s"),
        ("kinds of block", str(report["kinds"])),
        ("dtype, recipe", f"{report['dtype']}, {report['recipe'] or 'not quantized'}"),
        ("attention", report["attention"]),
        ("device", report["device"].get("name") or report["device"]["type"]),
        ("tokens of a video", f"{fewest} to {most}"),
        ("videos in a call", f"1 to {report['sizes']['batch']}"),
    ]
    return table(("package", ""), rows)


__all__ = ["add", "read_sizes", "run"]
