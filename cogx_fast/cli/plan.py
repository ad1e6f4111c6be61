"""``cogx-fast plan``: find a sparse attention plan for a model."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from cogx_fast.cli.arguments import add_command, count
from cogx_fast.cli.searching import add_pipeline, check_out, open_pipeline
from cogx_fast.terminal import Progress, table

if TYPE_CHECKING:
    from cogx_fast.tune.attention import Finding


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = add_command(
        commands, "plan", run, "find a sparse attention plan for a model",
        "Run a few denoising steps, score 3-D windows for every layer and head from sampled queries, and write the "
        "sparsest ones whose error is small enough: load(..., attention_plan=FILE).",
    )  # fmt: skip
    add_pipeline(command, steps=6, finds="plan")
    command.add_argument(
        "--max-error", type=float, required=True, metavar="E",
        help="the largest relative error of a head's output and of a block's attention output, e.g. 0.1",
    )  # fmt: skip
    command.add_argument(
        "--dense-part", type=float, default=0.2, metavar="P",
        help="the first part of every schedule, which stays dense (default: %(default)s)",
    )  # fmt: skip
    command.add_argument("--rows", type=count, default=64, help="queries sampled in each call (default: %(default)s)")
    command.add_argument("--block-size", type=count, default=128, help="tokens in a block (default: %(default)s)")
    command.add_argument(
        "--tile", type=count, nargs=2, default=(2, 8), metavar=("FRAMES", "ROWS"),
        help="frames and rows of a block (default: 2 8)",
    )  # fmt: skip


def run(arguments: argparse.Namespace, progress: Progress) -> tuple[dict[str, Any], str]:
    """Carry it out: the report, and its text."""
    from cogx_fast.attention.plan_file import write_plan
    from cogx_fast.tune.attention import find_plan

    out = check_out(arguments)
    opened = open_pipeline(arguments, progress, attention="sdpa")
    finding = find_plan(
        opened.pipe,
        opened.requests,
        max_error=arguments.max_error,
        dense_part=arguments.dense_part,
        rows=arguments.rows,
        block_size=arguments.block_size,
        tile=tuple(arguments.tile),
        on_step=progress.steps("scoring", 2 * len(opened.requests) * arguments.steps),
    )
    write_plan(finding.plan, out)
    report = {
        "out": str(out),
        "model": arguments.model,
        "max_error": arguments.max_error,
        "grid": list(finding.grid),
        "text_tokens": finding.text_len,
        "dense_above": finding.plan.dense_above,
        "kept": float(finding.kept_LN.mean()),
        "kept_by_head": finding.kept_LN.tolist(),
        "head_errors": finding.head_errors_LN.tolist(),
        "block_errors": finding.block_errors_L.tolist(),
        "patterns": _patterns(finding),
        "warnings": opened.notes,
    }
    return report, _render(report)


def _patterns(finding: Finding) -> list[dict[str, Any]]:
    heads = [index for row in finding.plan.choice for index in row]
    kept = {index: float(part) for index, part in zip(heads, finding.kept_LN.flatten(), strict=True)}
    return [
        {"pattern": str(pattern), "heads": heads.count(index), "kept": kept[index]}
        for index, pattern in enumerate(finding.plan.patterns)
        if index in kept
    ]


def _render(report: dict[str, Any]) -> str:
    layers = table(
        ("layer", "kept", "head error", "block error"),
        [
            (str(layer), f"{sum(kept) / len(kept):.2f}", f"{max(errors):.3f}", f"{block:.3f}")
            for layer, (kept, errors, block) in enumerate(
                zip(report["kept_by_head"], report["head_errors"], report["block_errors"], strict=True)
            )
        ],
    )
    patterns = table(
        ("pattern", "heads", "kept"),
        [(each["pattern"], str(each["heads"]), f"{each['kept']:.2f}") for each in report["patterns"]],
    )
    grid = " × ".join(map(str, report["grid"]))
    return (
        f"{layers}\n\n{patterns}\n\n"
        f"{report['out']}: {report['kept']:.2f} of all blocks kept at {grid} patches, dense at timesteps from "
        f"{report['dense_above']:g}; errors are the largest seen (--max-error {report['max_error']:g})\n"
        f"use it: load(..., attention_plan={report['out']!r}, compile=True)"
    )


__all__ = ["add", "run"]
