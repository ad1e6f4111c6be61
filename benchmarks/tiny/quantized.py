"""What each recipe does to the tiny pipeline's videos: ``python -m benchmarks.tiny.quantized``.

Every prompt once, 50 steps, against the same model in bf16: PSNR of the videos, and whether they still show what was
asked for. fp8-dynamic is emulated where it cannot run. ``--write`` puts the figures into the recipes' files.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import cogx_fast
import quant
from benchmarks.tiny.assemble import quiet
from benchmarks.tiny.evaluate import generate
from cogx_fast.assets import digits, tiny_pipeline_dir
from cogx_fast.terminal import table
from cogx_fast.video import quality

BARS = {"weight-only": 35.0, "dynamic": 28.0}
"""Least mean PSNR in dB, by kind of recipe."""
DTYPE = torch.bfloat16
"""Of the pipeline that recipes are held against, and of what they leave."""
POINTS = 2.0
"""Digits and motions may be rightly read in so many per cent fewer of the videos."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tiny.quantized", description=__doc__)
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help="names or files [all that come along]")
    parser.add_argument("--steps", type=int, default=50, help="of sampling [50]")
    parser.add_argument("--prompts", type=int, default=50, help="how many of the 50, from the first [50]")
    parser.add_argument("--rounds", type=int, default=1, help="videos of each prompt [1]")
    parser.add_argument("--device", default="cpu", help="[cpu]")
    parser.add_argument("--out", type=Path, help="write the figures there, as JSON")
    parser.add_argument("--write", action="store_true", help="put them into the recipes' files")
    options = parser.parse_args(arguments)
    quiet()
    expected = videos(None, options)
    asked = [(digit, motion) for digit, motion, _ in digits.all_prompts()[: options.prompts]] * options.rounds
    before = quality.measure(expected, asked)
    rows = [{"recipe": "bf16", "digit": before.digit, "motion": before.motion}]
    for name in options.recipes or quant.recipe_names():
        recipe = runnable(name, options.device)
        if recipe is None:
            print(f"{name}: neither runs nor can be emulated here", flush=True)
            continue
        begun = time.monotonic()
        actual = videos(recipe, options)
        found = quality.measure(actual, asked)
        psnr = [quality.psnr(a, b) for a, b in zip(actual, expected, strict=True)]
        rows.append(
            {
                "recipe": recipe.name, "psnr_db": float(np.mean(psnr)), "worst_psnr_db": float(np.min(psnr)),
                "digit": found.digit, "motion": found.motion, "passed": passed(recipe, np.mean(psnr), found, before),
                "seconds": time.monotonic() - begun,
            }
        )  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
        if options.write:
            write(recipe, rows[-1], before)
    print(render(rows))
    if options.out is not None:
        options.out.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return int(not all(row.get("passed", True) for row in rows))


def runnable(name: str, device: str) -> quant.Recipe | None:
    """The recipe, or where it cannot run its emulation, or None."""
    recipe = quant.load_recipe(name)
    model = cogx_fast.load("tiny", dtype=DTYPE, device=device)
    for candidate in (lambda: recipe, recipe.emulated):
        try:
            quant.plan(model, candidate())
            return candidate()
        except quant.QuantError:
            continue
    return None


def videos(recipe: quant.Recipe | None, options: argparse.Namespace) -> np.ndarray[Any, Any]:
    """Clips of every prompt ``(B, F, H, W, 3)`` as uint8, made by our model."""
    from diffusers import CogVideoXPipeline

    model = cogx_fast.load("tiny", dtype=DTYPE, device=options.device)
    if recipe is not None:
        quant.quantize(model, recipe)
    pipe = CogVideoXPipeline.from_pretrained(tiny_pipeline_dir(), transformer=model, torch_dtype=DTYPE)
    pipe.to(options.device).set_progress_bar_config(disable=True)
    words = [words for _, _, words in digits.all_prompts()[: options.prompts]]
    rounds = [generate(pipe, words, seed=seed, steps=options.steps, guidance=6.0) for seed in range(options.rounds)]
    return np.concatenate(rounds)


def passed(recipe: quant.Recipe, psnr_db: float, found: quality.Accuracy, before: quality.Accuracy) -> bool:
    least = BARS["dynamic" if recipe.dynamic else "weight-only"]
    lost = 100 * max(before.digit - found.digit, before.motion - found.motion)
    return psnr_db >= least and lost <= POINTS


def write(recipe: quant.Recipe, row: dict[str, Any], before: quality.Accuracy) -> None:
    """The figures as the ``[quality]`` table of the recipe's file; the rest of it stays as it is."""
    path = Path(recipe.origin)
    text = re.sub(r"\n\[quality\]\n(?:(?!\n\n|\n\[).)*\n", "\n", path.read_text(encoding="utf-8"), flags=re.S)
    emulated = "emulated, " if recipe.name != path.stem else ""
    figures = (
        f'measured_on = "tiny, {emulated}all prompts, 50 steps, against bf16"\npsnr_db = {row["psnr_db"]:.1f}\n'
        f"digit = {row['digit']:.3f}\nmotion = {row['motion']:.3f}\ndigit_bf16 = {before.digit:.3f}\n"
    )
    head, rule, rest = text.partition("\n[[rule]]")
    path.write_text(f"{head.rstrip()}\n\n[quality]\n{figures}{rule}{rest}", encoding="utf-8")


def render(rows: list[dict[str, Any]]) -> str:
    def figure(row: dict[str, Any], key: str, unit: str, scale: float = 1.0) -> str:
        return f"{scale * row[key]:.1f}{unit}" if key in row else "–"

    return table(
        ("recipe", "PSNR", "worst", "digit", "motion", "bars"),
        [
            (row["recipe"], figure(row, "psnr_db", " dB"), figure(row, "worst_psnr_db", " dB"),
             figure(row, "digit", " %", 100), figure(row, "motion", " %", 100),
             {True: "held", False: "MISSED", None: ""}[row.get("passed")])
            for row in rows
        ],
    )  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
