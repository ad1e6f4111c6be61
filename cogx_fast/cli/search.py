"""``cogx-fast quantize --search``: find the fastest mix of schemes within a budget of error, and write its recipe."""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogx_fast.cli.arguments import add_offload
from cogx_fast.cli.output import finite
from cogx_fast.cli.searching import check_out, open_pipeline
from cogx_fast.terminal import Progress, table
from cogx_fast.whole_file import write_whole

if TYPE_CHECKING:
    from cogx_fast.pipelines.generation import Request
    from cogx_fast.tune.recipe import Outcome
    from quant.calibration import Sample

PROMPTS = ("the digit seven moving left", "the digit two moving up")
"""For the tiny pipeline, where none are given."""


def add_options(command: argparse.ArgumentParser) -> None:
    """What a search takes besides ``--search`` and ``--out``."""
    group = command.add_argument_group("with --search, which writes the recipe --out FILE.toml")
    group.add_argument("--budget", type=float, metavar="DB", help="least SQNR of the predicted noise, in dB, e.g. 25")
    group.add_argument("--prompts", nargs="+", metavar="PROMPT", help="what to calibrate with")
    group.add_argument("--image", metavar="FILE", help="the first frame, for image-to-video models")
    group.add_argument("--steps", type=int, default=20, help="denoising steps to calibrate on (default: %(default)s)")
    group.add_argument("--samples", type=int, default=16, help="calls to keep of those (default: %(default)s)")
    group.add_argument(
        "--schemes", default="int8-dynamic,fp8-dynamic,int8-weight-only,fp8-weight-only",
        help="to choose from (default: %(default)s); emulated where they cannot run here",
    )  # fmt: skip
    group.add_argument(
        "--by-kind", action="store_true", help="all blocks alike: quicker, and a recipe that fits any depth of model"
    )
    group.add_argument("--for-device", default="h100", help="whose ceilings estimate the time (default: %(default)s)")
    add_offload(group)
    group.add_argument(
        "--check", action=argparse.BooleanOptionalAction, default=True, help="compare a video made with the recipe"
    )
    command.set_defaults(seed=None, guidance=6.0, frames=None, height=None, width=None)  # not asked for here


def run(arguments: argparse.Namespace, progress: Progress) -> tuple[dict[str, Any], str]:
    """Carry it out: the report, and its text."""
    from cogx_fast.measure.devices import get_device
    from cogx_fast.tune.recipe import find_recipe

    if arguments.budget is None:
        raise ValueError("--search needs --budget DB and --out FILE.toml")
    out, device = check_out(arguments), get_device(arguments.for_device)
    arguments.prompts = arguments.prompts or (PROMPTS if arguments.model == "tiny" else ())
    if not arguments.prompts:
        raise ValueError("--search needs --prompts, a few that are like those the model will be used with")
    model, pipe, requests, notes = open_pipeline(arguments, progress, attention="sdpa")
    samples = _samples(pipe, requests, arguments, out.with_suffix(".calibration.safetensors"), progress)
    bar = progress.steps("measuring linears", 1)

    def measured(done: int, of_all: int) -> None:
        nonlocal bar
        if done == 1:
            bar = progress.steps("measuring linears", of_all)
        bar(done)

    outcome = find_recipe(
        pipe.transformer,
        samples,
        budget_db=arguments.budget,
        name=out.stem,
        model_name=arguments.model,
        tokens=model.tokens(requests[0].size),
        device=device,
        state_path=out.with_suffix(".search.json"),
        schemes=[scheme.strip() for scheme in arguments.schemes.split(",")],
        by_kind=arguments.by_kind,
        on_measured=measured,
        on_mix=lambda number: progress.stage(f"measuring mix {number}"),
    )
    write_whole(out, outcome.recipe.to_toml())
    report = _report(arguments, outcome, pipe.transformer, len(samples)) | {"warnings": notes}
    if arguments.check:
        progress.stage("comparing a video")
        report["video_psnr_db"] = finite(_check(pipe, outcome, requests[0]))
    report["plot"] = _plot(report, out.with_suffix(".png"))
    progress.clear()
    return report, _render(report)


def _samples(
    pipe: Any, requests: list[Request], arguments: argparse.Namespace, path: Path, progress: Progress
) -> list[Sample]:
    """Calibration inputs: those of an earlier, equal search, or new ones, which are kept."""
    from cogx_fast.tune.recipe import calibrate
    from quant.calibration import load_calibration, save_calibration

    about = {
        "model": arguments.model, "prompts": [request.prompt for request in requests], "steps": arguments.steps,
        "samples": arguments.samples, "dtype": str(pipe.transformer.dtype), "image": arguments.image,
    }  # fmt: skip
    if path.is_file():
        samples, known = load_calibration(path)
        if known == about:
            return samples
        raise ValueError(f"{path}: was recorded for something else: remove it, or choose another --out")
    bar = progress.steps("calibrating", sum(request.steps for request in requests))
    samples = calibrate(pipe, requests, samples=arguments.samples, on_step=bar)
    save_calibration(path, samples, about)
    return samples


def _check(pipe: Any, outcome: Outcome, request: Request) -> float:
    """PSNR in dB of a video made with the recipe, to the one without."""
    from cogx_fast.pipelines.generation import run_pipeline
    from cogx_fast.video.quality import psnr
    from quant.sensitivity import quantized

    expected = run_pipeline(pipe, request).frames
    with quantized(pipe.transformer, outcome.found.best.mix, outcome.recipe):
        actual = run_pipeline(pipe, request).frames
    assert expected is not None
    assert actual is not None
    return psnr(actual, expected)


def _report(arguments: argparse.Namespace, outcome: Outcome, model: Any, samples: int) -> dict[str, Any]:
    from cogx_fast.tune.recipe import finite_db, stored_bytes
    from quant.recipe import of_all_blocks

    searched = outcome.searched
    whole = stored_bytes(model, {}, searched)

    def describe(tried: Any) -> dict[str, Any]:
        return {
            "quantized": len(tried.mix),
            "noise_sqnr_db": finite_db(tried.error),
            "time": tried.seconds / outcome.unquantized_seconds,
            "bytes": stored_bytes(model, tried.mix, searched) / whole,
        }

    linears = [
        {
            "linear": fqn,
            "scheme": scheme,
            "output_sqnr_db": finite_db(errors.own),
            "noise_sqnr_db": finite_db(errors.prediction),
            "chosen": any(
                mixed == scheme and fqn in (linear, of_all_blocks(linear))
                for linear, mixed in outcome.found.best.mix.items()
            ),
        }
        for (fqn, scheme), errors in outcome.errors.items()
    ]
    return {
        "model": arguments.model, "out": str(arguments.out), "budget_db": arguments.budget, "samples": samples,
        "estimated_for": arguments.for_device, "searched": len(searched), "best": describe(outcome.found.best),
        "tried": [describe(tried) for tried in outcome.found.tried], "linears": linears,
    }  # fmt: skip


def _plot(report: dict[str, Any], path: Path) -> str | None:
    """The picture's path; None where what draws it is not installed."""
    from cogx_fast.extras import MissingDependencyError
    from cogx_fast.video.plots import Mix, plot_mixes

    def mix(each: dict[str, Any]) -> Mix:
        decibels = each["noise_sqnr_db"]
        return Mix(sqnr_db=float("inf") if decibels is None else decibels, time=each["time"], bytes=each["bytes"])

    try:
        picture = plot_mixes(
            [mix(each) for each in report["tried"]], best=mix(report["best"]), budget_db=report["budget_db"],
            title=f"{report['model']}: mixes of schemes, time estimated for {report['estimated_for']}",
        )  # fmt: skip
    except MissingDependencyError:
        return None
    picture.save(path)
    return str(path)


def _render(report: dict[str, Any]) -> str:
    from quant.recipe import of_all_blocks

    kinds: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for each in report["linears"]:
        kinds.setdefault((of_all_blocks(each["linear"]), each["scheme"]), []).append(each)
    linears = table(
        ("linear", "scheme", "output", "noise, worst", "noise, median", "chosen"),
        [
            (name, scheme, _worst(group, "output_sqnr_db"), _worst(group, "noise_sqnr_db"), _median(group),
             f"{sum(each['chosen'] for each in group)} of {len(group)}")
            for (name, scheme), group in kinds.items()
        ],
    )  # fmt: skip
    mixes = table(
        ("linears quantized", "noise SQNR", "time", "bytes"),
        [
            (str(each["quantized"]), _decibels(each["noise_sqnr_db"]), f"{each['time']:.2f}", f"{each['bytes']:.2f}")
            for each in report["tried"]
        ],
    )
    best = report["best"]
    video = f", video at {_decibels(report['video_psnr_db'])} PSNR" if "video_psnr_db" in report else ""
    return (
        f"{linears}\n\n{mixes}\n\n"
        f"{report['out']}: {best['quantized']} of {report['searched']} linears, noise at "
        f"{_decibels(best['noise_sqnr_db'])} SQNR ({report['budget_db']:g} asked for){video}; time {best['time']:.2f} "
        f"of bf16's, estimated from {report['estimated_for']}'s stated ceilings, and {best['bytes']:.2f} of its bytes\n"
        f"use it: load({report['model']!r}, quant={report['out']!r}, compile=True)"
    )


def _worst(group: list[dict[str, Any]], key: str) -> str:
    return _decibels(min((each[key] for each in group if each[key] is not None), default=None))


def _median(group: list[dict[str, Any]]) -> str:
    known = [each["noise_sqnr_db"] for each in group if each["noise_sqnr_db"] is not None]
    return _decibels(statistics.median(known) if known else None)


def _decibels(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f} dB"


__all__ = ["add_options", "run"]
