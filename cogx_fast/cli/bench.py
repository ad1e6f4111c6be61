"""``cogx-fast bench``: a step of this transformer against diffusers', and a gate on it for a user's own CI."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogx_fast.cli.arguments import DTYPE_NAMES, add_command, add_running, add_size, count
from cogx_fast.cli.task import name_dtype
from cogx_fast.pipelines.locate import locate
from cogx_fast.terminal import Progress, table

if TYPE_CHECKING:
    from cogx_fast.measure.contest import Contest, Work

_WORK = ("model", "frames", "height", "width", "batch", "layers", "dtype", "compile", "attention", "quant", "device")
"""What is measured, in the report's ``work`` and on the command line: a baseline holds for the same of these alone."""

AS_FAST, SLOWER, CANNOT_TELL = "as fast", "slower", "cannot tell"
_WORDS = {
    AS_FAST: "as fast as it was",
    SLOWER: "SLOWER THAN IT WAS",
    CANNOT_TELL: "cannot tell, measure longer (--rounds {rounds}) or on a quieter machine",
}


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = add_command(
        commands, "bench", run, "time a step against diffusers on this machine, and against an earlier run",
        "Time a denoising step of this transformer and of diffusers' in turns, with random weights, and compare the "
        "ratio, which hardly depends on the machine, with that of an earlier run. Exit status 1: slower than it was, "
        "by more than the margin, with 95 % confidence; 0: as fast as it was, or these rounds cannot tell.",
    )  # fmt: skip
    command.add_argument("model", nargs="?", metavar="MODEL", help="as for info; the baseline's own if there is one")
    command.add_argument(
        "--against", type=Path, metavar="FILE", help="the --json of an earlier run, whose work is done"
    )
    command.add_argument(
        "--margin", type=_margin, default=0.05, metavar="SHARE", help="how much slower is still well (default: 5%%)"
    )
    command.add_argument("--rounds", type=count, default=20, help="steps of each, in turns (default: %(default)s)")
    add_size(command)
    command.add_argument("--batch", type=count, default=2, help="videos in one call (default: %(default)s, guidance)")
    command.add_argument("--layers", type=count, help="transformer blocks, for a shorter run (default: the model's)")
    command.add_argument("--dtype", choices=DTYPE_NAMES, default="bf16", help="default: %(default)s")
    add_running(command, compile_default=True, compile_help="compile ours (default: yes); diffusers' runs eagerly")
    command.add_argument("--quant", metavar="RECIPE", help="quantize ours")


def run(arguments: argparse.Namespace, progress: Progress) -> tuple[dict[str, Any], str]:
    """Carry it out: the report, and its text."""
    from cogx_fast.measure import contest

    baseline = None if arguments.against is None else _read(arguments.against)
    asked = {name: getattr(arguments, name) for name in _WORK} if baseline is None else _same(arguments, baseline)
    work = _work(asked)
    pair = contest.Contest(work, progress)
    report: dict[str, Any] = {"work": asked, "machine": contest.machine(work.device), "first_call": pair.first_call}
    report |= _measure(pair, arguments.rounds, progress)
    if baseline is not None:
        limit = baseline["ratio"]["median"] * (1 + arguments.margin)
        if verdict(report["ratio"], limit) != AS_FAST:  # once more, longer, before anyone is alarmed
            report |= _measure(pair, 2 * arguments.rounds, progress)
        report["baseline"] = {"ratio": baseline["ratio"], "machine": baseline["machine"], "limit": limit}
        report["verdict"] = verdict(report["ratio"], limit)
        report["passed"] = {AS_FAST: True, SLOWER: False, CANNOT_TELL: None}[report["verdict"]]
    return report, render(report)


def verdict(ratio: Mapping[str, float], limit: float) -> str:
    """What an interval of ratios says of a limit: nothing, where the limit lies in it.

    Args:
        ratio: ``low`` and ``high``, its 95 % confidence interval.
        limit: the highest ratio that is still well.

    Returns:
        ``AS_FAST``, ``SLOWER`` or ``CANNOT_TELL``.
    """
    if ratio["high"] <= limit:
        return AS_FAST
    return SLOWER if ratio["low"] > limit else CANNOT_TELL


def render(report: dict[str, Any]) -> str:
    """The same for people."""
    from cogx_fast.measure.contest import OURS, PEER

    rows = [
        (
            name,
            *(f"{1e3 * report['seconds'][name][share]:.4g}" for share in ("p20", "p50", "p80")),
            f"{report['first_call'][name]:.1f}",
        )
        for name in (PEER, OURS)
    ]
    ratio, done = report["ratio"], report["work"]
    lines = [
        ", ".join(f"{name} {done[name]}" for name in _WORK if done[name] is not None),
        ", ".join(f"{name} {value}" for name, value in report["machine"].items()),
        "",
        table(("ms a step", "20 %", "median", "80 %", "first call, s"), rows),
        "",
        f"{OURS} takes {ratio['median']:.3f} × diffusers' time (95 % confidence: {ratio['low']:.3f} to "
        f"{ratio['high']:.3f}; {report['rounds']} rounds, in turns)",
    ]
    if "baseline" in report:
        before = report["baseline"]
        word = _WORDS[report["verdict"]].format(rounds=4 * report["rounds"])
        lines.append(f"{word}: the baseline is {before['ratio']['median']:.3f}, the limit {before['limit']:.3f}")
        changed = [name for name, value in report["machine"].items() if before["machine"].get(name) != value]
        if changed:
            lines.append(f"the baseline was taken with another {', '.join(changed)}")
    return "\n".join(lines)


def _measure(pair: Contest, rounds: int, progress: Progress) -> dict[str, Any]:
    from cogx_fast.measure import contest, timing

    seconds = pair.run(rounds, progress)
    shares = {"p20": 0.2, "p50": 0.5, "p80": 0.8}
    return {
        "rounds": rounds,
        "seconds": {
            name: {key: timing.percentile(times, share) for key, share in shares.items()}
            for name, times in seconds.items()
        },
        "ratio": dataclasses.asdict(timing.ratio(seconds[contest.OURS], seconds[contest.PEER])),
    }


def _work(asked: dict[str, Any]) -> Work:
    from cogx_fast.measure import contest
    from cogx_fast.pipelines import generation

    if asked["model"] is None:
        raise ValueError("no model is named: give one, e.g. 5b, or the report of an earlier run with --against")
    model = locate(asked["model"])
    video = model.video(frames=asked["frames"], height=asked["height"], width=asked["width"])
    config = model.config
    if asked["layers"] is not None:
        config = dataclasses.replace(config, num_layers=asked["layers"])
    device = generation.choose_device(asked["device"])
    work = contest.Work(
        config=config,
        tokens=model.tokens(video),
        batch=asked["batch"],
        dtype=generation.DTYPES[asked["dtype"]],
        device=device,
        compile=asked["compile"],
        attention=asked["attention"],
        quant=asked["quant"],
    )
    asked |= {"frames": video.frames, "height": video.height, "width": video.width, "layers": config.num_layers}
    asked |= {"dtype": name_dtype(work.dtype), "device": device.type}
    return work


def _read(path: Path) -> dict[str, Any]:
    """The report of an earlier run.

    Raises:
        ValueError: it is none.
    """
    try:
        baseline = json.loads(path.read_text(encoding="utf-8"))
        if set(baseline["work"]) == set(_WORK) and baseline["ratio"]["median"] > 0 and dict(baseline["machine"]):
            return dict(baseline)
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{path} is no report of cogx-fast bench: make one with 'cogx-fast bench MODEL --json > {path}'")


def _same(arguments: argparse.Namespace, baseline: dict[str, Any]) -> dict[str, Any]:
    """The baseline's work; a model and device may be named again, and must then be the same."""
    work = dict(baseline["work"])
    for name in ("model", "device"):
        given = getattr(arguments, name)
        if given is not None and given != work[name]:
            raise ValueError(f"{name} is {given}, but the baseline is of {work[name]}: make a baseline of its own")
    return work


def _margin(text: str) -> float:
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < 10:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a share such as 5% or 0.05")
    return value


__all__ = ["add", "render", "run", "verdict"]
