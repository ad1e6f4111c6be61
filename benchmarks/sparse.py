"""Sparse attention: time and error against the part of the blocks that is kept.

``python -m benchmarks.sparse`` runs three cases and draws them: ``time`` (flex-attention, compiled),
``shapes`` (synthetic attention at full size, from sampled queries) and ``tiny`` (videos of the trained tiny model).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cogx_fast.attention.attend import attend
from cogx_fast.attention.masks import LayerBlocks, sparse_blocks
from cogx_fast.attention.plan import FULL, AttentionPlan
from cogx_fast.attention.windows import Pattern, block_boxes, kept_blocks, token_order
from cogx_fast.config import PRESETS
from cogx_fast.model.tables import Grid, rotary_tables

RESULTS = Path(__file__).with_name("results")
TEXT = 226
GRIDS: dict[str, Grid] = {"5b": (13, 30, 45), "1.5-5b": (11, 48, 85)}
PATTERNS = (
    *(Pattern(kind="radial", space=space) for space in (1 / 16, 1 / 8, 1 / 4, 1 / 2)),
    *(Pattern(kind="tiles", frames=frames, space=space) for frames, space in ((1, 1 / 8), (3, 1 / 4), (5, 1 / 4))),
    *(Pattern(kind="spatial", frames=frames) for frames in (0, 1)),
    *(Pattern(kind="temporal", space=space) for space in (0.0, 1 / 8)),
)


class Row(NamedTuple):
    """One point: what was measured for a pattern (or plan) in a case."""

    case: str
    pattern: str
    kept: float
    values: dict[str, float]


# -- time -------------------------------------------------------------------------------------------------------------


def time_patterns(device: torch.device, *, rounds: int = 7) -> Iterator[Row]:
    """Compiled flex-attention, dense and sparse in turn: the least time of each, against dense.

    On CUDA all of 5b's heads in bf16 at its size. On the CPU one head in fp32 at half of that, in one thread and
    seconds of the processor, which other processes take less from.
    """
    on_gpu = device.type == "cuda"
    dtype, heads, grid = (torch.bfloat16, 48, GRIDS["5b"]) if on_gpu else (torch.float32, 1, (13, 22, 33))
    boxes = block_boxes(grid, AttentionPlan.tile, TEXT, AttentionPlan.block_size)
    keeps = [kept_blocks(pattern, boxes) for pattern in (FULL, *PATTERNS)]
    order = token_order(grid, AttentionPlan.tile)
    blocks = sparse_blocks(keeps, torch.arange(len(keeps))[:, None], AttentionPlan.block_size, order, device)
    tokens = TEXT + math.prod(grid)
    q, k, v = torch.randn(3, 1, tokens, heads, 64, device=device, dtype=dtype).unbind(0)

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: LayerBlocks) -> Tensor:
        return attend(q, k, v, backend="flex", mask=mask.block_mask(q.shape[1]))

    clock = time.perf_counter if on_gpu else time.process_time
    compiled = torch.compile(attention, fullgraph=True)
    least = [math.inf] * len(keeps)
    for turn in range(rounds + 1):
        for index in range(len(keeps)):
            _wait(device)
            begin = clock()
            compiled(q, k, v, blocks.of_layer(index))
            _wait(device)
            if turn:  # the first compiles and warms
                least[index] = min(least[index], clock() - begin)
    for pattern, keep, seconds in zip((FULL, *PATTERNS), keeps, least, strict=True):
        yield Row("time", str(pattern), float(keep.double().mean()), {"seconds": seconds, "ratio": seconds / least[0]})


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# -- synthetic shapes -------------------------------------------------------------------------------------------------


def synthetic(name: str, model: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (S, K) of one head, text first, video tokens in their own order.

    ``near``: by the model's own rotary angles, as heads that look around themselves have it. ``uniform``: everything
    alike. ``random``: each query has its few favourites anywhere. ``far``: what stands opposite in time and space.
    ``first``: all look at the first frame. Values are noise, so that nothing left out is made up for by its neighbours.
    """
    grid, generator = GRIDS[model], torch.Generator().manual_seed(seed)
    tokens = TEXT + math.prod(grid)
    noise = torch.randn(3, tokens, 64, generator=generator)
    if name == "uniform":
        return torch.zeros(tokens, 64), torch.zeros(tokens, 64), noise[2]
    if name == "random":
        return 1.5 * noise[0], 1.5 * noise[1], noise[2]
    if name == "first":
        direction, frame = torch.zeros(64), math.prod(grid[1:])
        direction[0] = 1
        q, k = noise[0] * 0.3 + 8 * direction, noise[1] * 0.3
        k[TEXT : TEXT + frame] += 8 * direction
        return q, k, noise[2]
    cos, sin = rotary_tables(PRESETS[model], grid)
    turned = torch.stack([cos[:, ::2], sin[:, ::2]], -1).flatten(1)  # the vector (1, 0, 1, 0, …), turned
    q = torch.cat([0.1 * noise[0, :TEXT], 2.5 * turned + 0.3 * noise[0, TEXT:]])
    opposite = turned.flip(0) if name == "far" else turned
    k = torch.cat([0.1 * noise[1, :TEXT], 2.5 * opposite + 0.3 * noise[1, TEXT:]])
    return q, k, noise[2]


SHAPES = ("near", "uniform", "random", "far", "first")


def shape_errors(*, rows: int = 128) -> Iterator[Row]:
    """The relative error of a head's output under every pattern, for every synthetic kind of attention."""
    from cogx_fast.tune.attention import masked_outputs

    for model, grid in GRIDS.items():
        boxes = block_boxes(grid, AttentionPlan.tile, TEXT, AttentionPlan.block_size)
        keep_PQQ = torch.stack([kept_blocks(pattern, boxes) for pattern in (FULL, *PATTERNS)])
        plan = AttentionPlan(patterns=(FULL,), choice=((0,),))
        order_S = plan.on_grid(grid, TEXT).joint_order_S
        places = torch.randint(TEXT, len(order_S), (rows,), generator=torch.Generator().manual_seed(1))
        keep_PRQ = keep_PQQ[:, places // plan.block_size].float()
        kept_P = keep_PQQ.double().mean((1, 2)).tolist()
        for name in SHAPES:
            q, k, v = (each[order_S][None] for each in synthetic(name, model))
            dense, *outputs = masked_outputs(q[:, places], k, v, keep_PRQ, plan.block_size)
            for pattern, kept, output in zip(PATTERNS, kept_P[1:], outputs, strict=True):
                error = float((output - dense).norm() / dense.norm())
                yield Row(f"{name}, {model}", str(pattern), kept, {"error": error})


# -- the tiny model ---------------------------------------------------------------------------------------------------


def tiny_videos(*, steps: int = 20, every: int = 3) -> Iterator[Row]:
    """Videos of the tiny model, sparse against dense: PSNR, and whether they show what was asked for."""
    from diffusers import CogVideoXPipeline

    from benchmarks.tiny.evaluate import MAX_TEXT, generate
    from cogx_fast import load
    from cogx_fast.assets import digits, tiny_pipeline_dir
    from cogx_fast.pipelines.generation import Request, quiet
    from cogx_fast.runtime.compiling.compile import CompileConfig, compile_model
    from cogx_fast.sizes import VideoSize
    from cogx_fast.tune.attention import find_plan
    from cogx_fast.video import quality

    warnings.filterwarnings("ignore")
    asked = digits.all_prompts()[::every]
    model = load("tiny", dtype="fp32")
    pipe = quiet(CogVideoXPipeline.from_pretrained(tiny_pipeline_dir(), transformer=model, torch_dtype=torch.float32))

    def videos() -> np.ndarray[Any, Any]:
        return generate(pipe, [words for *_, words in asked], seed=0, steps=steps, guidance=6.0)

    def row(name: str, made: np.ndarray[Any, Any], kept: float) -> Row:
        accuracy = quality.measure(list(made), [(digit, motion) for digit, motion, _ in asked])
        figures = {"digit": accuracy.digit, "motion": accuracy.motion}
        if made is not dense:
            psnr = [quality.psnr(ours / 255.0, theirs / 255.0) for ours, theirs in zip(made, dense, strict=True)]
            figures["psnr_db"] = float(np.mean(psnr))
        return Row("tiny", name, kept, figures)

    small: dict[str, Any] = {"block_size": 8, "tile": (2, 2)}
    layers, grid = model.config.num_layers, (5, 4, 4)
    plans: dict[str, AttentionPlan] = {}
    for pattern in PATTERNS:
        plan = AttentionPlan(patterns=(FULL, pattern), choice=((1,),) * layers, **small)
        if all(not torch.equal(plan.kept(grid, MAX_TEXT), other.kept(grid, MAX_TEXT)) for other in plans.values()):
            plans[str(pattern)] = plan
    for part in (0.0, 0.4):
        plan = plans["radial space 0.25"]  # the built-in one
        plans[f"radial space 0.25, dense {part:g}"] = dataclasses.replace(plan, dense_above=1001 - 1000 * part)
    requests = [
        Request(prompt=words, size=VideoSize(frames=17, height=64, width=64), steps=6) for *_, words in asked[::4]
    ]
    for error in (0.1, 0.2, 0.4, 0.6):
        plans[f"plan, error {error:g}"] = find_plan(pipe, requests, max_error=error, **small).plan
    dense = videos()
    yield row("full", dense, 1.0)
    model.set_attention_backend("flex")
    compile_model(model, CompileConfig(dynamic=True))
    for name, plan in plans.items():
        model.set_attention_plan(plan)
        yield row(name, videos(), float(plan.kept(grid, MAX_TEXT).mean()))


# -- the report -------------------------------------------------------------------------------------------------------

CASES: dict[str, Callable[[torch.device], Iterator[Row]]] = {
    "time": time_patterns,
    "shapes": lambda _: shape_errors(),
    "tiny": lambda _: tiny_videos(),
}


def draw(rows: Sequence[Row], path: Path, *, device: str) -> None:
    """Three panels over the kept part of the blocks: time, error of synthetic attention, the tiny model's videos."""
    from benchmarks.drawing import COLOURS, figure

    made, axes = figure(1, 3, height=3.6, title="Sparse attention, by the part of 128-token blocks that is kept")
    first, second, third = axes[0]
    timed = [row for row in rows if row.case == "time"]
    first.plot([0, 1], [0, 1], color="#9aa0a6", linewidth=0.8)
    first.plot([row.kept for row in timed], [row.values["ratio"] for row in timed], "o", color=COLOURS["ours"], ms=4)
    first.set_title(f"time against dense ({device})", fontsize=8)
    marks = dict(zip(SHAPES, ("o", "s", "^", "v", "D"), strict=True))
    for name, mark in marks.items():
        points = [row for row in rows if row.case == f"{name}, 5b"]
        second.plot([row.kept for row in points], [row.values["error"] for row in points], mark, ms=4, label=name)
    second.set_yscale("log")
    second.set_title("error of a head, synthetic, 5b", fontsize=8)
    second.legend(fontsize=7, frameon=False)
    small = [row for row in rows if row.case == "tiny" and row.kept < 1]
    for label, colour, found in (("one window", "ours", False), ("a plan", "other", True)):
        points = [row for row in small if row.pattern.startswith("plan") == found and "dense" not in row.pattern]
        xs, ys = [row.kept for row in points], [row.values["psnr_db"] for row in points]
        third.plot(xs, ys, "o", color=COLOURS[colour], ms=4, label=label)
    third.set_title("PSNR to dense, dB, tiny model (blocks of 8)", fontsize=8)
    third.legend(fontsize=7, frameon=False)
    for axis in axes[0]:
        axis.set_xlim(0, 1.02)
        axis.set_xlabel("kept", fontsize=8)
    made.savefig(path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sparse", description=__doc__)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], help="which ones [all]")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where sparse.json and sparse.svg go [%(default)s]")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    path = options.out / "sparse.json"
    known = [Row(*each) for each in json.loads(path.read_text())] if path.exists() else []
    for case in options.cases or CASES:
        rows = []
        for row in CASES[case](torch.device(options.device)):
            print(f"{row.case:18} {row.pattern:28} {row.kept:.3f}  {row.values}", flush=True)
            rows.append(row)
        names = {row.case for row in rows}
        known = [row for row in known if row.case not in names] + rows
    path.write_text(json.dumps(known, indent=1) + "\n")
    draw(known, options.out / "sparse.svg", device=options.device)


if __name__ == "__main__":
    main()
