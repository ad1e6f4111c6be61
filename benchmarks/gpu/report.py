"""The report for people, from the ledger."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import drawing
from benchmarks.gpu import budget
from benchmarks.gpu.cases import HELD, QUICK_MODEL, Case
from benchmarks.gpu.measure import UNITS
from cogx_fast.measure.timing import Interval
from cogx_fast.terminal import table

HEADER = ("case", "ms", "diffusers, ms", "ratio", "% ceilings", "peak, GiB", "launches", "first call, s", "error")
HELD_HEADER = ("case", "peak, GiB", "predicted, GiB", "first call, s")


def write(ledger: Path, chosen: Sequence[Case], out: Path) -> list[str]:
    """Write ``ceilings.json`` and ``ratios.png``.

    Returns:
        The report: what went wrong, what was not run, the table, and what it was measured with and on.
    """
    lines = {budget.short(line["test"]): line for line in budget.ended(ledger)}
    found = [(case, lines[str(case)]["found"]) for case in chosen if "found" in lines.get(str(case), {})]
    report = [*budget.summary(ledger), *_recorded(found)]
    unsupported = [str(case) for case in chosen if lines.get(str(case), {}).get("outcome") == "skipped"]
    if unsupported:
        report.append(f"UNSUPPORTED here: {', '.join(unsupported)}")
    if not found:
        return [*report, "no case was timed"]
    last = lines[str(found[-1][0])]
    ceilings, here = last["ceilings"], last["environment"]
    (out / "ceilings.json").write_text(json.dumps(ceilings) + "\n")
    toy = " — TOY SIZES, THE TIMES MEAN NOTHING" if any(case.model == QUICK_MODEL for case in chosen) else ""
    timed = [(case, each) for case, each in found if case.part not in HELD]
    held = [(case, each) for case, each in found if case.part in HELD]
    bars = [(str(case), Interval(median=ratio, low=ratio, high=ratio), "ours" if case.owner == "ours" else "peer")
            for case, each in timed for ratio in [each["metrics"]["ratio"]]]  # fmt: skip
    report += ["", table(HEADER, [_row(case, each) for case, each in timed]), ""] if timed else []
    report += ["", table(HELD_HEADER, [_held_row(case, each) for case, each in held]), ""] if held else []
    report += [f"told: {told}" for _, each in found for told in each["told"]]
    report += [
        "ceilings measured here: "
        + ", ".join(f"{name} {value:.1f} {UNITS.get(name, 'TFLOP/s')}" for name, value in ceilings.items()),
        f"{here['device']}, torch {here['torch']}, diffusers {here['diffusers']}, torchao {here['torchao']}, commit "
        f"{str(here['commit'])[:9]}{' (changed)' if here['dirty'] else ''}{toy}",
        "ratio: to diffusers compiled (attention alone: to SDPA), in turns. % ceilings: the least time by these",
        "ceilings in % of the time. peak: above weights. error: relative, of one layer, against fp32.",
    ]
    if bars:
        label = "time, diffusers compiled = 1"
        report.append(drawing.ratios(out / "ratios.png", bars, title=here["device"] + toy, label=label))
    return report


def _recorded(found: Sequence[tuple[Case, Mapping[str, Any]]]) -> list[str]:
    places: dict[str, list[str]] = {}
    for case, each in found:
        if each["recorded"]:
            places.setdefault(each["recorded"], []).append(str(case))
    return [f"{place} (commit it): {', '.join(names)}" for place, names in places.items()]


def _row(case: Case, found: Mapping[str, Any]) -> tuple[str, ...]:
    metrics, notes = found["metrics"], found["notes"]
    return (
        str(case),
        f"{1e3 * notes['seconds']:.2f}",
        f"{1e3 * notes['peer_seconds']:.2f}",
        f"{metrics['ratio']:.3f}",
        f"{metrics['percent_of_ceilings']:.1f}",
        f"{metrics['peak_mib'] / 1024:.2f}",
        str(metrics.get("launches", "–")),
        f"{notes['first_call']:.1f}",
        f"{notes['error']:.1e}",
    )


def _held_row(case: Case, found: Mapping[str, Any]) -> tuple[str, ...]:
    sizes = (found["metrics"]["peak_mib"], found["notes"]["predicted_mib"])
    return str(case), *(f"{size / 1024:.2f}" for size in sizes), f"{found['notes']['seconds']:.1f}"
