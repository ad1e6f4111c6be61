"""What step caches do to the tiny pipeline's videos, ours and diffusers': ``python -m benchmarks.tiny.steps``.

Every prompt once, against unmodified diffusers without a cache: PSNR and SSIM of the videos, and whether they still
show what was asked for, at 1.5, 2 and 3 times fewer evaluations of blocks. Each way of caching is run with the knobs
that give the least error of the latents on a few other seeds, among those that compute little enough. Rows are written
as they come; a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import cogx_fast
from benchmarks.drawing import COLOURS, figure
from benchmarks.tiny.assemble import quiet
from benchmarks.tiny.caches import Evaluations, Family, Setting, calibrate, ours, own_families, upstream_families
from benchmarks.tiny.evaluate import MAX_TEXT, generate, load_pipeline
from cogx_fast.assets import digits, tiny_pipeline_dir
from cogx_fast.pipelines.generation import Request
from cogx_fast.sizes import choose_video
from cogx_fast.terminal import table
from cogx_fast.tune.steps import find_schedule
from cogx_fast.video import quality

BUDGETS = (1.5, 2.0, 3.0)
RESULTS = Path(__file__).resolve().parents[1] / "results" / "steps-tiny.json"
GUIDANCE = 6.0
LEAST, MOST = 0.97, 1.15
"""A setting is of a budget if it computes that many times fewer blocks, by these factors."""
CALIBRATED = 4
"""Videos by which knobs are chosen, of seeds of their own."""
TRIED = 4
"""Settings nearest to a budget that are."""
HIGHEST = 100.0
"""PSNR in dB of equal videos."""
SEED = 7
"""Of what is not judged."""


class Bench:
    """Both pipelines, and what is made with them."""

    def __init__(self, prompts: int, steps: int) -> None:
        self.steps = steps
        self.asked = digits.all_prompts()[:prompts]
        self.pipes = {owner: load_pipeline(tiny_pipeline_dir(), torch.float32) for owner in ("diffusers", "ours")}
        self.pipes["ours"] = cogx_fast.accelerate(self.pipes["ours"])
        chosen = digits.all_prompts()
        self.held = [chosen[number * len(chosen) // CALIBRATED][2] for number in range(CALIBRATED)]
        self._plain: dict[str, Tensor] = {}
        self._speedups: dict[tuple[str, str], float] = {}
        self._errors: dict[tuple[str, str], float] = {}

    def latents(self, pipe: Any, words: Sequence[str]) -> Tensor:
        """Of videos that are not judged."""
        generators = [torch.Generator().manual_seed(SEED * 1000 + number) for number in range(len(words))]
        found = pipe(
            list(words), num_inference_steps=self.steps, guidance_scale=GUIDANCE, max_sequence_length=MAX_TEXT,
            generator=generators, output_type="latent",
        ).frames  # fmt: skip
        return torch.as_tensor(found)

    def speedup(self, family: Family, setting: Setting) -> float:
        """How many times fewer blocks are computed, counted on one video that is not judged."""
        key = family.name, setting.knobs
        if setting.speedup is not None:
            return setting.speedup
        if key not in self._speedups:
            pipe = self.pipes[family.owner]
            with setting.applied(pipe):
                counted = Evaluations(pipe)
                self.latents(pipe, self.held[:1])
                counted.close()
            self._speedups[key] = 2 * self.steps * pipe.transformer.config.num_layers / counted.done
        return self._speedups[key]

    def error(self, family: Family, setting: Setting) -> float:
        """Relative error of latents, mean of the videos that are not judged."""
        key = family.name, setting.knobs
        if key not in self._errors:
            pipe = self.pipes[family.owner]
            if family.owner not in self._plain:
                self._plain[family.owner] = self.latents(pipe, self.held)
            with setting.applied(pipe):
                found = self.latents(pipe, self.held)
            plain = self._plain[family.owner].flatten(1)
            self._errors[key] = float(((found.flatten(1) - plain).norm(dim=1) / plain.norm(dim=1)).mean())
        return self._errors[key]

    def choose(self, family: Family, budget: float) -> Setting | None:
        """The setting of a budget with the least error; None where the family has none."""
        fit = [
            (abs(speedup - budget), number)
            for number, setting in enumerate(family.settings)
            if LEAST * budget <= (speedup := self.speedup(family, setting)) <= MOST * budget
        ]
        nearest = [family.settings[number] for _, number in sorted(fit)[:TRIED]]
        return min(nearest, key=lambda setting: self.error(family, setting), default=None)

    def videos(self, family: Family, setting: Setting) -> tuple[Any, float]:
        """The judged videos, and how many times fewer blocks were computed."""
        pipe, words = self.pipes[family.owner], [words for _, _, words in self.asked]
        counted = Evaluations(pipe)
        made = []
        for first in range(0, len(words), 1 if family.decides else len(words)):
            some = words[first : first + 1] if family.decides else words
            with setting.applied(pipe):
                made.append(generate(pipe, some, seed=0, steps=self.steps, guidance=GUIDANCE, first=first))
        counted.close()
        whole = 2 * self.steps * pipe.transformer.config.num_layers * len(words)
        return np.concatenate(made), whole / counted.done

    def tuned(self, budget: float, state: Path) -> Family:
        """What ``cogx-fast tune steps`` finds on the videos that are not judged."""
        pipe = self.pipes["ours"]
        size = choose_video(pipe.transformer.config)
        requests = [
            Request(prompt=words, size=size, steps=self.steps, seed=SEED * 1000 + number, guidance=GUIDANCE)
            for number, words in enumerate(self.held)
        ]
        found = find_schedule(pipe, requests, speedup=budget, state=state)
        whole = [step for step, blocks in enumerate(found.schedule.blocks) if blocks]
        return ours("tuned", {f"{found.schedule.forecast}, whole {whole}": found.schedule})

    def families(self) -> list[Family]:
        """Every way of caching but the tuned one."""
        pipe = self.pipes["diffusers"]
        ratios = calibrate(pipe, lambda pipe: self.latents(pipe, self.held), self.steps)
        pipe.scheduler.set_timesteps(self.steps)
        timesteps = pipe.scheduler.timesteps.tolist()
        return own_families(self.pipes["ours"].transformer, timesteps) + upstream_families(self.steps, ratios)


def judge(videos: Any, plain: Any, asked: Sequence[Any]) -> dict[str, float]:
    """Figures of a row."""
    read = quality.measure(videos, [(digit, motion) for digit, motion, _ in asked])
    if videos is plain:
        return {"digit": read.digit, "motion": read.motion}
    psnr = [min(quality.psnr(a, b), HIGHEST) for a, b in zip(videos, plain, strict=True)]
    ssim = [quality.ssim(a, b) for a, b in zip(videos, plain, strict=True)]
    return {
        "psnr_db": float(np.mean(psnr)), "worst_psnr_db": float(np.min(psnr)),
        "ssim": float(np.mean(ssim)), "worst_ssim": float(np.min(ssim)), "digit": read.digit, "motion": read.motion,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tiny.steps", description=__doc__)
    parser.add_argument("--prompts", type=int, default=50, help="how many of the 50, from the first [50]")
    parser.add_argument("--steps", type=int, default=50, help="of sampling [50]")
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS, help="times fewer blocks [1.5 2 3]")
    parser.add_argument("--only", default="", metavar="TEXT", help="only ways of caching with this in their name")
    parser.add_argument("--out", type=Path, default=RESULTS, help="results, and the plot beside them [%(default)s]")
    options = parser.parse_args(arguments)
    quiet()
    torch.set_num_threads(1)
    settings = {"prompts": options.prompts, "steps": options.steps, "guidance": GUIDANCE, "dtype": "float32"}
    rows = read(options.out, settings)
    bench = Bench(options.prompts, options.steps)
    nothing = Setting("", _nothing)
    plain, _ = bench.videos(Family("no cache", "diffusers", ()), nothing)
    done = {(row["name"], row["budget"]) for row in rows}
    if not rows:
        rows.append({"name": "no cache", "owner": "diffusers", "budget": 1.0, **judge(plain, plain, bench.asked)})

    def add(family: Family, budget: float, setting: Setting | None) -> None:
        begun = time.monotonic()
        row: dict[str, Any] = {"name": family.name, "owner": family.owner, "budget": budget}
        if setting is not None:
            videos, speedup = bench.videos(family, setting)
            row |= {"knobs": setting.knobs, "speedup": speedup, **judge(videos, plain, bench.asked)}
        rows.append(row)
        write(options.out, settings, rows)
        print(json.dumps(row), f"{time.monotonic() - begun:.0f} s", flush=True)

    if ("no cache", 1.0) not in done:
        add(Family("no cache", "ours", ()), 1.0, nothing)
    families = [each for each in bench.families() if options.only in each.name]
    state = options.out.with_suffix(".npz")
    for budget in sorted(options.budgets, key=lambda each: abs(each - 2)):
        if ("tuned", budget) not in done and options.only in "tuned":
            tuned = bench.tuned(budget, state)
            add(tuned, budget, tuned.settings[0])
        for family in families:
            if (family.name, budget) not in done:
                add(family, budget, bench.choose(family, budget))
    state.unlink(missing_ok=True)
    print(render(rows))
    print(draw(rows, options.out.with_suffix(".svg")))
    return 0


@contextlib.contextmanager
def _nothing(pipe: Any) -> Iterator[None]:
    yield


def read(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of a run with the same settings; none where there was none."""
    if not path.exists():
        return []
    held = json.loads(path.read_text(encoding="utf-8"))
    if held["settings"] != settings:
        raise SystemExit(f"{path} is of {held['settings']}, not {settings}: remove it, or give another --out")
    rows: list[dict[str, Any]] = held["rows"]
    return rows


def write(path: Path, settings: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def render(rows: list[dict[str, Any]]) -> str:
    found = []
    for row in sorted(rows, key=lambda row: (row["budget"], -row.get("psnr_db", 0.0))):
        name = f"{row['name']} ({row['owner']})"
        if "digit" not in row:
            found.append((f"{row['budget']:g}", name, "does not reach it", "", "", "", ""))
            continue
        beside = ("", "", "")
        if "psnr_db" in row:
            mean, worst = (f"{row[key + 'psnr_db']:.1f}" for key in ("", "worst_"))
            like, unlike = (f"{row[key + 'ssim']:.3f}" for key in ("", "worst_"))
            beside = f"{row['speedup']:.2f}", f"{mean} ({worst}) dB", f"{like} ({unlike})"
        read = (f"{100 * row[key]:.0f} %" for key in ("digit", "motion"))
        found.append((f"{row['budget']:g}", name, *beside, *read))
    return table(("budget", "cache", "times fewer", "PSNR", "SSIM", "digit", "motion"), found)


def draw(rows: list[dict[str, Any]], path: Path) -> str:
    """PSNR against how many times fewer blocks are computed."""
    try:
        made, axes = figure(1, height=5, title="Step caches on the trained tiny model: videos against uncached ones")
    except ModuleNotFoundError:
        return "no plot: matplotlib is not installed (pip install 'cogx-fast[plot]')"
    axis = axes[0, 0]
    measured = [row for row in rows if row["budget"] > 1 and "psnr_db" in row]
    markers = dict(zip(sorted({row["name"] for row in measured}), "osD^v<>PX*hd", strict=False))
    for name, marker in markers.items():
        points = sorted((row["speedup"], row["psnr_db"]) for row in measured if row["name"] == name)
        owner = next(row["owner"] for row in measured if row["name"] == name)
        kind = "ours" if owner == "ours" else "peer"
        label = f"{name} ({owner})"
        axis.plot(*zip(*points, strict=True), marker=marker, color=COLOURS[kind], label=label, linewidth=1)
    axis.set_xlabel("times fewer evaluations of blocks", fontsize=8)
    axis.set_ylabel("PSNR, dB", fontsize=8)
    axis.legend(fontsize=7, frameon=False)
    made.savefig(path)
    return f"plot: {path}"


if __name__ == "__main__":
    raise SystemExit(main())
