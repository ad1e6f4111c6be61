"""``cogx-fast quantize``: quantize a transformer with a recipe and write it."""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from cogx_fast.cli import search
from cogx_fast.cli.arguments import DTYPE_NAMES, add_command
from cogx_fast.cli.output import warn
from cogx_fast.terminal import Progress, scaled, table

if TYPE_CHECKING:
    from quant import LinearReport


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = add_command(
        commands, "quantize", run, "quantize a transformer and write it, or search for a recipe",
        "Quantize a transformer with a recipe, say what became of every linear, and write the checkpoint. With "
        "--search: run a pipeline, measure what quantizing each linear does to the predicted noise, and write a recipe "
        "of the fastest mix of schemes within a budget. Stopped, it goes on where it was.",
    )  # fmt: skip
    command.add_argument(
        "model", metavar="MODEL", help="a pipeline or transformer directory, a file, a hub id, or tiny"
    )
    task = command.add_mutually_exclusive_group(required=True)
    task.add_argument("--recipe", help="a name that `cogx-fast recipes` lists, or the path of a .toml file")
    task.add_argument("--search", action="store_true", help="find a recipe")
    command.add_argument("--out", required=True, metavar="PATH", help="the directory to write, or the recipe's file")
    command.add_argument("--dtype", choices=DTYPE_NAMES, help="of what is not quantized (default: as stored)")
    command.add_argument("--device", default="cpu", help="where to quantize (default: %(default)s)")
    command.add_argument(
        "--nearest", action="store_true", help="use the nearest scheme where the recipe's cannot run on the device"
    )
    search.add_options(command)


def run(arguments: argparse.Namespace, progress: Progress) -> tuple[dict[str, Any], str]:
    """Carry it out: the report, and its text."""
    if arguments.search:
        return search.run(arguments, progress)
    import quant
    from cogx_fast.loading import load
    from cogx_fast.model.cpu import SlowDtypeWarning

    recipe = quant.load_recipe(arguments.recipe)
    progress.stage(f"loading {arguments.model}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SlowDtypeWarning)  # it is written, not run
        model = load(arguments.model, dtype=arguments.dtype, device=arguments.device)
    progress.stage(f"quantizing with {recipe.name}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        done = quant.quantize(model, recipe, on_unsupported="nearest" if arguments.nearest else "error")
    notes = [str(warning.message) for warning in caught if str(warning.message).startswith("recipe ")]
    warn(notes, progress)
    progress.stage(f"writing {arguments.out}")
    model.save_pretrained(arguments.out)
    report = {"model": arguments.model, "out": str(arguments.out), **done.to_dict(), "warnings": notes}
    return report, f"{render(done.linears)}\n{arguments.out}: written"


def render(linears: Iterable[LinearReport]) -> str:
    """The report for people: linears that differ only in their block's number, and fared alike, in one line."""
    from quant.recipe import of_all_blocks

    groups: dict[tuple[str, str], list[LinearReport]] = {}
    reasons: dict[str, dict[str, None]] = {}
    for linear in linears:
        name = of_all_blocks(linear.fqn)
        groups.setdefault((name, linear.scheme or "–"), []).append(linear)
        if linear.reason is not None:
            reasons.setdefault(linear.reason, {})[name] = None
    rows = [_row(name, scheme, group) for (name, scheme), group in groups.items()]
    everything = [linear for group in groups.values() for linear in group]
    written = table(
        ("linear", "number", "before", "after", "weight SQNR", "scheme"),
        [*rows, _row("all", "", everything)],
        last_is_total=True,
    )
    left = [f"left as they are: {', '.join(names)} ({reason})" for reason, names in reasons.items()]
    return "\n".join([written, *left])


def _row(name: str, scheme: str, linears: Sequence[LinearReport]) -> tuple[str, ...]:
    measured = [linear.sqnr_db for linear in linears if linear.sqnr_db is not None]
    low, high = (min(measured), max(measured)) if measured else (math.nan, math.nan)
    sqnr = "–" if not measured else f"{low:.1f} dB" if high - low < 0.05 else f"{low:.1f} to {high:.1f} dB"
    return (
        name,
        str(len(linears)),
        scaled(sum(linear.bytes_before for linear in linears), "B"),
        scaled(sum(linear.bytes_after for linear in linears), "B"),
        sqnr,
        scheme,
    )


__all__ = ["add", "render", "run"]
