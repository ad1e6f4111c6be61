"""The timing gate: ours against unmodified diffusers, in turns in one process on this machine (``make perf-check``).

    python -m benchmarks.check [--accept] [--rounds 20]

Each case's median ratio is held against ``expected/timing.csv`` (case, metric, value, margin). It fails on a ratio
above its row's by more than the margin, on a missing row and on a stale one; a ratio below it by more than the margin
is reported and fails nothing, for on a busy machine it may be luck. A case that fails is measured again with twice the
rounds before it counts. The table holds for the versions and the kind of machine that it names. One thread, so that
neighbours on other cores matter less. Every run is added to the history (``environment.HISTORY``).

With ``--int8`` it prints, in the gate's place, what int8-dynamic takes of fp32's time, both ours and compiled; with
``--step-cache`` what a compiled denoising loop takes with step caches of that without.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment, gate
from cogx_fast.config import PRESETS
from cogx_fast.loading import load
from cogx_fast.measure import contest, timing
from cogx_fast.measure.contest import OURS, PEER, Contest, Work
from cogx_fast.runtime.compiling.compile import CompileConfig
from cogx_fast.runtime.module import CogVideoXModel
from cogx_fast.runtime.step_caching.step_schedule import NAMED
from cogx_fast.sizes import Tokens
from cogx_fast.terminal import Progress, table

EXPECTED = Path(__file__).parent / "expected" / "timing.csv"
METRIC = "ratio"
ROUNDS = 20
MARGINS = {"eager": "0.2", "compiled": "0.12"}
"""Recorded with new rows. Ratios of 20 rounds scattered by 5 % (eager) and 3 % (compiled) on two cores that six others
used; the planted regressions of the tests cost 30 % and more."""

_SMALL: dict[str, Any] = {
    "num_attention_heads": 6, "num_layers": 2, "text_embed_dim": 64, "max_text_seq_length": 16, "time_embed_dim": 64
}  # fmt: skip


def cases() -> dict[str, Work]:
    """Every case by name: 5b cut to two blocks of width 384 and 400 tokens, so that a step takes some 50 ms, and to one
    of width 640 and 1,264 tokens. Compiled by default we are held against diffusers' whole model as one graph, which
    has the fewest calls; and like against like: blocks against blocks, the whole against the whole."""
    config = dataclasses.replace(PRESETS["5b"], **_SMALL)
    larger = dataclasses.replace(config, num_attention_heads=10, num_layers=1)
    found = {}
    for name, work in {
        "5b-small": Work(config=config, tokens=Tokens(text=16, grid=(4, 8, 12))),
        "5b-larger": Work(config=larger, tokens=Tokens(text=16, grid=(4, 12, 26))),
    }.items():
        compiled = dataclasses.replace(work, compile=True, peer_compile="model")
        found |= {
            f"{name}/bf16/eager": work,
            f"{name}/fp32/eager": dataclasses.replace(work, dtype=torch.float32),
            f"{name}/bf16/compiled": compiled,
            f"{name}/bf16/compiled blocks": dataclasses.replace(compiled, peer_compile="blocks"),
            f"{name}/bf16/compiled whole": dataclasses.replace(compiled, compile=CompileConfig(scope="model")),
        }
    return found


INT8_WIDTHS = (384, 1920)
"""Of a block: a small one's, and 2b's."""
SMALL_TOKENS = Tokens(text=16, grid=(4, 8, 16))


def time_int8(rounds: int, progress: Progress) -> str:
    """A table of int8-dynamic's compiled step against fp32's, in turns, at each of ``INT8_WIDTHS``."""
    rows = []
    for width in INT8_WIDTHS:
        config = dataclasses.replace(PRESETS["5b"], **_SMALL | {"num_attention_heads": width // 64, "num_layers": 1})
        work = Work(config=config, tokens=SMALL_TOKENS, dtype=torch.float32)
        arguments = contest.call_arguments(config, work.tokens, work.batch, work.dtype, work.device)
        models = {
            quant or "fp32": load(contest.random_upstream(work), compile=True, quant=quant)
            for quant in (None, "int8-dynamic")
        }
        steps = {name: functools.partial(contest.run, model, arguments) for name, model in models.items()}
        timing.take_turns(steps, rounds=2)  # compiles
        seconds = timing.take_turns(steps, rounds=rounds, on_round=progress.steps(f"width {width}", rounds))
        milliseconds = (f"{1e3 * timing.median(each).median:.1f}" for each in seconds.values())
        ratio = str(timing.ratio(seconds["int8-dynamic"], seconds["fp32"]))
        rows.append((str(width), str(work.batch * work.tokens.joint), *milliseconds, ratio))
    progress.clear()
    return table(("width", "rows", "fp32, ms", "int8-dynamic, ms", "ratio (95 % confidence)"), rows)


STEPS = 24
"""Of the denoising loop that step caches are timed in."""


def time_step_caches(rounds: int, progress: Progress) -> str:
    """A table of a compiled loop's time with each named step cache against that without, in turns."""
    config = dataclasses.replace(PRESETS["5b"], **_SMALL | {"num_layers": 4})
    work = Work(config=config, tokens=SMALL_TOKENS, dtype=torch.float32)
    arguments = contest.call_arguments(config, work.tokens, work.batch, work.dtype, work.device)
    timesteps = torch.linspace(999, 1, STEPS).round().long()

    def loop(model: CogVideoXModel) -> None:
        for timestep in timesteps:
            contest.run(model, arguments | {"timestep": timestep.expand(work.batch)})

    models = {
        name: load(contest.random_upstream(work), compile=True, step_cache=None if name == "none" else name)
        for name in ("none", *NAMED)
    }
    loops = {name: functools.partial(loop, model) for name, model in models.items()}
    timing.take_turns(loops, rounds=1)  # compiles
    seconds = timing.take_turns(loops, rounds=rounds, on_round=progress.steps("loops", rounds))
    progress.clear()
    rows = []
    for name, schedule in NAMED.items():
        blocks = schedule.schedule(models[name], range(STEPS, 0, -1)).speedup
        ratio = str(timing.ratio(seconds[name], seconds["none"]))
        rows.append((name, f"{blocks:.2f}", f"{timing.median(seconds[name]).median:.2f}", ratio))
    none = f"{timing.median(seconds['none']).median:.2f}"
    return table(("step cache", "times fewer blocks", f"s, none {none}", "ratio (95 % confidence)"), rows)


def measure(contest: Contest, rounds: int, progress: Progress | None = None) -> dict[str, Any]:
    """One case's times and ratio."""
    seconds = contest.run(rounds, progress)
    return {
        METRIC: dataclasses.asdict(timing.ratio(seconds[OURS], seconds[PEER])),
        "rounds": rounds,
        "seconds": {name: dataclasses.asdict(timing.median(times)) for name, times in seconds.items()},
        "first_call": contest.first_call,
    }


def check(
    chosen: Mapping[str, Work],
    expected: Mapping[tuple[str, str], gate.Row],
    *,
    rounds: int = ROUNDS,
    progress: Progress | None = None,
    build: Callable[..., Contest] = Contest,
) -> tuple[gate.Verdict, dict[str, Any]]:
    """Measure cases and hold them against a table.

    Returns:
        The verdict, and the measurements by case.
    """
    progress = progress or Progress()
    results: dict[str, Any] = {}
    for name, work in chosen.items():
        contest = build(work, progress)
        results[name] = measure(contest, rounds, progress)
        row = expected.get((name, METRIC))
        if row is not None and results[name][METRIC]["median"] > _limit(row):
            results[name] = measure(contest, 2 * rounds, progress)
    return judge(expected, {name: result[METRIC]["median"] for name, result in results.items()}, versions()), results


def judge(
    expected: Mapping[tuple[str, str], gate.Row], ratios: Mapping[str, float], here: Mapping[str, str]
) -> gate.Verdict:
    """Hold ratios against a table's rows; only what is slower, missing or stale fails."""
    verdict = gate.compare(expected, _measured(ratios), {}, here, told={METRIC})
    stale = [f"{row} has no case" for row in expected.values() if row.case not in {*cases(), gate.VERSIONS}]
    verdict.stale += [] if verdict.not_binding else stale
    verdict.replacement = [
        dataclasses.replace(row, margin=_margin(row.case)) if row.margin == "0" else row for row in verdict.replacement
    ]
    return verdict


def accept(results: Mapping[str, Any], path: Path = EXPECTED) -> None:
    """Record ratios; rows of cases that were not measured stay if they hold for these versions."""
    for name, result in results.items():  # a case at a time: margins differ
        measured = _measured({name: result[METRIC]["median"]})
        gate.record(path, versions(), measured, {}, order=cases(), margins={METRIC: _margin(name)})


def _measured(ratios: Mapping[str, float]) -> gate.Measured:
    return {name: {METRIC: round(ratio, 3)} for name, ratio in ratios.items()}


def versions() -> dict[str, str]:
    """What the table's ratios depend on."""
    here = contest.machine(torch.device("cpu"))
    return {
        "torch": here["torch"].partition("+")[0],
        "diffusers": here["diffusers"],
        "processor": here["device"].partition(",")[0],
    }


def text(results: Mapping[str, Any], expected: Mapping[tuple[str, str], gate.Row]) -> str:
    """The table for people."""
    rows = []
    for name, result in results.items():
        row, ratio = expected.get((name, METRIC)), result[METRIC]
        rows.append(
            (
                name,
                *(f"{1e3 * result['seconds'][owner]['median']:.1f}" for owner in (PEER, OURS)),
                f"{ratio['median']:.3f}",
                f"{ratio['low']:.3f}–{ratio['high']:.3f}",
                row.value if row else "–",
                f"{_limit(row):.3f}" if row else "–",
                str(result["rounds"]),
            )
        )
    header = ("case", f"{PEER}, ms", f"{OURS}, ms", "ratio", "95 % confidence", "expected", "limit", "rounds")
    return table(header, rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.check", description=__doc__.splitlines()[0])
    parser.add_argument("--accept", action="store_true", help="record the ratios as expected")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="steps of each, in turns (default: %(default)s)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases with this in their name")
    parser.add_argument("--int8", action="store_true", help="time int8-dynamic against fp32, and nothing else")
    parser.add_argument("--step-cache", action="store_true", help="time loops with step caches, and nothing else")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.step_cache:
        print(time_step_caches(options.rounds, Progress()))
        return 0
    if options.int8:
        print(time_int8(options.rounds, Progress()))
        return 0
    chosen = {name: work for name, work in cases().items() if options.only in name}
    expected = gate.read(EXPECTED) if EXPECTED.is_file() else {}
    progress = Progress()
    verdict, results = check(chosen, expected, rounds=options.rounds, progress=progress)
    progress.clear()
    environment.record("perf-check", results, torch.device("cpu"))
    print(text(results, expected))
    if options.accept:
        accept(results)
        print(f"recorded in {EXPECTED}")
        return 0
    print(verdict)
    return int(not verdict.passed)


def _limit(row: gate.Row) -> float:
    return float(row.value) * (1 + float(row.margin))


def _margin(case: str) -> str:
    return MARGINS["compiled" if "compiled" in case else "eager"]


if __name__ == "__main__":
    sys.exit(main())
