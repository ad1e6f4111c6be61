"""Generate with unmodified diffusers and judge: ``python -m benchmarks.tiny.evaluate``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.tiny.assemble import quiet
from benchmarks.tiny.vae import reconstruction_psnr
from cogx_fast.assets import digits, tiny_pipeline_dir
from cogx_fast.video import quality

MAX_TEXT = 8


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tiny.evaluate", description=__doc__)
    parser.add_argument("--pipeline", type=Path, help="directory [the one that comes with the package]")
    parser.add_argument("--rounds", type=int, default=6, help="clips of each of the 50 prompts [6]")
    parser.add_argument("--steps", type=int, default=50, help="of sampling [50]")
    parser.add_argument("--guidance", type=float, default=6.0, help="guidance scale [6, the pipeline's own default]")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the pipeline [float32]")
    parser.add_argument("--seed", type=int, default=0, help="of the first round; the next ones follow it [0]")
    parser.add_argument("--device", default="cpu", help="to generate on [%(default)s]")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each [2]")
    parser.add_argument("--out", type=Path, default=Path("out/tiny"), help="where results go [out/tiny]")
    options = parser.parse_args(arguments)
    options.pipeline = options.pipeline or tiny_pipeline_dir()
    options.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn")) as pool:  # CUDA forbids forks
        seeds = range(options.seed, options.seed + options.rounds)
        waiting = pool.submit(_reconstruct, options)
        rounds = list(pool.map(_generate, [options] * len(seeds), seeds))
        frame_db, square_db = waiting.result()
    videos = np.concatenate(rounds)
    np.savez_compressed(options.out / "videos.npz", videos=videos)
    asked = [(digit, motion) for digit, motion, _ in digits.all_prompts()] * options.rounds
    metrics = {
        "steps": options.steps, "guidance": options.guidance, "dtype": options.dtype, "device": options.device,
        "seed": options.seed, "seconds": round(time.monotonic() - began),
        "generated": report(quality.measure(videos, asked)),
        "vae_held_out_db": {"frame": round(frame_db, 2), "digit_square": round(square_db, 2)},
        "judge_on_held_out": report(quality.measure(*quality.real_clips(297))), "neighbours": neighbours(videos),
    }  # fmt: skip
    (options.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    contact_sheet(videos, options.out / "contact-sheet.png")
    print(json.dumps(metrics, indent=2))


def _generate(options: argparse.Namespace, seed: int) -> np.ndarray[Any, Any]:
    quiet()
    torch.set_num_threads(1)
    pipe = load_pipeline(options.pipeline, getattr(torch, options.dtype)).to(options.device)
    return generate(
        pipe, [words for _, _, words in digits.all_prompts()], seed=seed, steps=options.steps, guidance=options.guidance
    )


def _reconstruct(options: argparse.Namespace) -> tuple[float, float]:
    quiet()
    torch.set_num_threads(1)
    return reconstruction_psnr(load_pipeline(options.pipeline, torch.float32).vae.to(options.device))


def load_pipeline(directory: Path, dtype: torch.dtype) -> Any:
    """Unmodified diffusers, as a user would load it."""
    from diffusers import CogVideoXPipeline

    pipe = CogVideoXPipeline.from_pretrained(directory, torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(
    pipe: Any, prompts: list[str], *, seed: int, steps: int, guidance: float, first: int = 0
) -> np.ndarray[Any, Any]:
    """Clips ``(B, F, H, W, 3)`` as uint8, each with its own seed, so that a clip does not depend on its batch.

    Args:
        pipe: the pipeline.
        prompts: some that follow each other among all of them.
        seed: of the round.
        steps: of sampling.
        guidance: its scale.
        first: the first prompt's number.
    """
    generators = [torch.Generator().manual_seed(seed * 1000 + first + i) for i in range(len(prompts))]
    frames = pipe(
        prompts, num_inference_steps=steps, guidance_scale=guidance, max_sequence_length=MAX_TEXT,
        generator=generators, output_type="np",
    ).frames  # fmt: skip
    return (np.asarray(frames) * 255).round().astype(np.uint8)


def report(accuracy: quality.Accuracy) -> dict[str, Any]:
    fields = {**dataclasses.asdict(accuracy), "digit_error": accuracy.digit_error}
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in fields.items()}


def neighbours(videos: np.ndarray[Any, Any]) -> dict[str, Any]:
    """How far generated digits are from the nearest training digit, beside how far real held-out digits are.

    Distances are between the judge's 14 × 14 crops of a middle frame. Much nearer than held-out digits would mean
    copies; much farther, shapes that are no digits.
    """
    pictures, _ = digits.load("train")
    count = len(pictures)
    still = torch.full((count,), quality.MOTIONS.index("standing still"))
    places = digits.draw_clips(torch.arange(count), still, torch.Generator().manual_seed(0), frames=1)
    known = quality.features(digits.render(places, pictures, frames=1)[:, 0])

    def nearest(clips: Any) -> torch.Tensor:
        middle = np.stack([np.asarray(clip)[len(clip) // 2].mean(-1) for clip in clips])
        scale = 255 if clips[0].dtype == np.uint8 else 1
        return torch.cdist(quality.features(torch.from_numpy(middle / scale).float()), known).amin(1)

    real, made = nearest(quality.real_clips(297)[0]), nearest(list(videos))
    low, high = real.quantile(0.01), real.quantile(0.99)
    return {
        "median_of_held_out": round(real.median().item(), 3),
        "median_of_generated": round(made.median().item(), 3),
        "least_of_held_out": round(real.min().item(), 3),
        "least_of_generated": round(made.min().item(), 3),
        "generated_nearer_than_1_percent_of_held_out": round((made < low).float().mean().item(), 4),
        "generated_farther_than_99_percent_of_held_out": round((made > high).float().mean().item(), 4),
    }


def contact_sheet(videos: np.ndarray[Any, Any], path: Path) -> None:
    """The first clip of every prompt, digits downwards and motions to the right: first, middle and last frame."""
    from PIL import Image

    rows = []
    for digit in range(10):
        clips = videos[digit * len(quality.MOTIONS) : (digit + 1) * len(quality.MOTIONS)]
        shown = [np.pad(clip[[0, 8, 16]], ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=90) for clip in clips]
        rows.append(
            np.concatenate([np.pad(np.concatenate(list(frames), 1), ((0, 0), (0, 6), (0, 0))) for frames in shown], 1)
        )
    Image.fromarray(np.concatenate(rows)).save(path)


if __name__ == "__main__":
    main()
