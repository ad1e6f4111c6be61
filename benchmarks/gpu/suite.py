"""A case from its correctness to its verdict."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import environment, gate
from benchmarks.gpu import measure, models, peaks
from benchmarks.gpu.cases import HELD, Case
from benchmarks.gpu.measure import OURS, PEER, Traffic
from cogx_fast.attention.backends import BACKENDS
from cogx_fast.measure import devices, timing
from cogx_fast.pipelines.memory import SPARE

EXPECTED = environment.ROOT / "benchmarks" / "expected" / "gpu"
MARGINS = {"ratio": "0.04", "percent_of_ceilings": "0.05", "peak_mib": "0.02", "launches": "0"}
"""Of new rows. Memory and launches are counted; the times' margins are guesses until a GPU says how they scatter."""
TIMES = ("ratio", "percent_of_ceilings")
"""May be better by luck; worse, they are measured again before it counts."""
LIMIT_EXACT = 1.1
"""Ours may be this much further from fp32 than diffusers in the same dtype."""
LIMIT_APPROXIMATE = 0.1
"""Relative error that a recipe or an inexact kernel may make: 20 dB."""
LIMIT_ATTENTION = 0.02
"""Of attention alone."""
LIMIT_PEAK = 0.1
"""Relative, of a peak to what is predicted; what ``memory=`` leaves to libraries' workspaces may be held beside it."""
SECONDS = 3.0
"""To warm the clocks up, and again to time."""


Held = dict[str, float | int]
Notes = dict[str, float | int | str]


class RedError(AssertionError):
    """The result is wrong, so nothing is timed."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a case showed."""

    metrics: Held
    """What is held."""
    notes: Notes
    """What is recorded beside it."""
    seconds: list[float]
    """Ours, by round."""
    traffic: dict[str, Traffic]
    """What ours does and what the peer does."""
    verdict: gate.Verdict
    recorded: str
    """Where it was recorded, and why; empty if it was not."""


class Suite:
    """Cases on one device, and the table that they are held against.

    Args:
        device: where.
        quick: toy sizes, and a compiler backend that generates no code: the times mean nothing.
        baselines: the folder of the tables, one a device.
        accept: record, and hold nothing against the table.
    """

    def __init__(self, device: torch.device, *, quick: bool, baselines: Path, accept: bool) -> None:
        self.device, self.quick, self.accept = device, quick, accept
        self.facts = environment.snapshot(device)
        self.table = baselines / f"{device_name(device)}.csv"
        self._now = timing.clock(device)
        self._peer: tuple[tuple[str, str], Callable[[], Tensor]] | None = None
        self._reference: tuple[str, Tensor, float] | None = None

    @functools.cached_property
    def ceilings(self) -> dict[str, float]:
        """Measured once for all cases of this process."""
        return measure.ceilings(self.device, quick=self.quick)

    @property
    def described(self) -> devices.Device:
        """The device by its measured ceilings."""
        return measure.describe(self.device, self.ceilings)

    def run(self, case: Case) -> Found:
        """Whether it is right, how fast it is beside its peer, and what the table says of that.

        Raises:
            RedError: it is wrong.
            UnsupportedError: it cannot run here.
        """
        self._collect()
        if case.part in HELD:
            return self._hold(case)
        if case.part == "attention":
            ours, peer, error = models.attention(case, self.device, quick=self.quick)
            if not error < LIMIT_ATTENTION:
                raise RedError(f"its relative error against fp32 is {error:.2e}, the limit {LIMIT_ATTENTION}")
            facts = {"error": error}
        else:
            facts = self._check(case)
            peer = self._peer_step(case)
            model = models.prepare(case, models.upstream(case, self.device), quick=self.quick)
            ours = _calls(case)(model, case, self.device)
        begin = self._now()
        ours()
        facts["first_call"] = self._now() - begin
        return self.judge(case, {OURS: ours, PEER: peer}, facts)

    def _hold(self, case: Case) -> Found:
        """What it holds at its peak, beside what is predicted; its seconds are those of one run, the first."""
        run, predicted = peaks.prepare(case, self.device)
        begin = self._now()
        peak = measure.peak_bytes(run, self.device)
        seconds = self._now() - begin
        most = (1 + LIMIT_PEAK) * predicted + (SPARE if self.device.type == "cuda" else 0)
        if not (1 - LIMIT_PEAK) * predicted <= peak <= most:
            raise RedError(f"it holds {peak / 2**20:,.0f} MiB at its peak, predicted are {predicted / 2**20:,.0f}")
        metrics: Held = {"peak_mib": round(peak / 2**20, 2)}
        notes: Notes = {
            "predicted_mib": round(predicted / 2**20, 2),
            "seconds": short(seconds),
            "commit": self._commit,
        }
        verdict = self._compare(case, metrics, notes)
        recorded = self._record(case, metrics, notes)
        return Found(metrics=metrics, notes=notes, seconds=[seconds], traffic={},
                     verdict=gate.Verdict() if recorded else verdict, recorded=recorded)  # fmt: skip

    def judge(self, case: Case, steps: Mapping[str, Callable[[], Tensor]], facts: Mapping[str, float]) -> Found:
        """Time steps in turns, and hold what they show against the table; what is too slow is timed again."""
        seconds = self._turns(steps, None)
        traffic = {name: measure.traffic(step, self.device) for name, step in steps.items()}
        seen = traffic[OURS]
        metrics, notes = self._show(case, seconds, seen, facts)
        verdict = self._compare(case, metrics, notes)
        if verdict.regressions:
            seconds = self._turns(steps, 2 * len(seconds[OURS]))
            metrics, notes = self._show(case, seconds, seen, facts)
            verdict = self._compare(case, metrics, notes)
        recorded = self._record(case, metrics, notes)
        return Found(metrics=metrics, notes=notes, seconds=seconds[OURS], traffic=traffic,
                     verdict=gate.Verdict() if recorded else verdict, recorded=recorded)  # fmt: skip

    def _turns(self, steps: Mapping[str, Callable[[], Tensor]], rounds: int | None) -> dict[str, list[float]]:
        return measure.in_turns(steps, self._now, rounds=rounds, seconds=0.05 if self.quick else SECONDS)

    def _show(
        self, case: Case, seconds: Mapping[str, list[float]], seen: Traffic, facts: Mapping[str, float]
    ) -> tuple[Held, Notes]:
        ours, theirs = (timing.median(seconds[name]).median for name in (OURS, PEER))
        held: Held = {
            "ratio": short(timing.ratio(seconds[OURS], seconds[PEER]).median),
            "percent_of_ceilings": short(100 * measure.floor_seconds(case, self.described) / ours),
            "peak_mib": round(seen.peak_bytes / 2**20, 2),
            **({} if seen.launches is None else {"launches": seen.launches}),
        }
        others = {"seconds": ours, "peer_seconds": theirs, **facts}
        return held, {**{name: short(value) for name, value in others.items()}, "commit": self._commit}

    @property
    def _commit(self) -> str:
        return str(self.facts["commit"])[:9] + ("+" if self.facts["dirty"] else "")

    def _compare(self, case: Case, metrics: Held, notes: Notes) -> gate.Verdict:
        if case.owner != OURS or self.accept:
            return gate.Verdict()
        name = str(case)
        return gate.compare(
            self._table(), {name: metrics}, {name: notes}, versions(self.facts), told=TIMES, margins=MARGINS
        )

    def _record(self, case: Case, metrics: Held, notes: Notes) -> str:
        """Record a case that the table lacks, or every one if that is asked for; say so."""
        table = self._table()
        if not self.accept and (str(case), "seconds") in table:
            return ""
        if not self.accept and table and self._compare(case, metrics, notes).not_binding:
            return ""
        held, beside = (metrics, notes) if case.owner == OURS else ({}, {**metrics, **notes})
        gate.record(self.table, versions(self.facts), {str(case): held}, {str(case): beside}, margins=MARGINS)
        return f"recorded in {self.table}" if self.accept else f"no baseline yet: recorded in {self.table}"

    def _table(self) -> dict[tuple[str, str], gate.Row]:
        return gate.read(self.table) if self.table.is_file() else {}

    def _peer_step(self, case: Case) -> Callable[[], Tensor]:
        """diffusers compiled, kept for the cases that follow with the same."""
        key = (case.model, case.part)
        if self._peer is None or self._peer[0] != key:
            self._peer = None
            self._collect()
            step = _calls(case)(models.compiled_peer(case, self.device, quick=self.quick), case, self.device)
            step()
            self._peer = (key, step)
        return self._peer[1]

    def _check(self, case: Case) -> dict[str, float]:
        """The error of one layer's model against diffusers' in fp32, beside diffusers' own in the same dtype.

        With a sparse plan at one of its dense timesteps, which use the same graph: what is sparse is no approximation
        of random weights' attention. That the sparse mask is the right one, ``tests/attention/test_plan.py`` holds.
        """
        one = models.one_layer(case)
        if self._reference is None or self._reference[0] != case.model:
            with models.exact_fp32():
                exact = models.perturbed(one, self.device)
                expected = models.step(exact, one, self.device, torch.float32, dense=True)()
            theirs = models.step(exact.to(models.DTYPE), one, self.device, dense=True)()
            self._reference = (case.model, expected, models.relative_error(theirs, expected))
            del exact
            self._collect()
        _, expected, peer_error = self._reference
        model = models.prepare(one, models.perturbed(one, self.device).to(models.DTYPE), quick=self.quick)
        error = models.relative_error(models.step(model, one, self.device, dense=True)(), expected)
        attention = BACKENDS["flex" if case.kept < 1 else "sdpa"]
        limit = LIMIT_APPROXIMATE if case.quant or not attention.exact else LIMIT_EXACT * peer_error
        if not error < float("inf") or (case.owner == OURS and error > limit):
            raise RedError(f"its relative error against fp32 is {error:.2e}, the limit {limit:.2e}")
        return {"error": error, "peer_error": peer_error}

    def _collect(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _calls(case: Case) -> Callable[..., models.Step]:
    return models.loop if case.part == "loop" else models.step


def device_name(device: torch.device) -> str:
    """As the device's table is named."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return name.replace(" ", "-").replace("/", "-")


def versions(facts: Mapping[str, Any]) -> dict[str, str]:
    """What a table holds for, of a snapshot's facts."""
    return {name: str(facts[name]).partition("+")[0] for name in ("torch", "diffusers", "torchao")}


def short(value: float) -> float:
    """Five digits."""
    return float(f"{value:.5g}")


def as_json(found: Found) -> dict[str, Any]:
    """What the ledger holds of a case."""
    traffic = {name: {"kinds": seen.kinds, "kernels": seen.kernels} for name, seen in found.traffic.items()}
    return {"metrics": found.metrics, "notes": found.notes, "traffic": traffic, "recorded": found.recorded,
            "told": found.verdict.told}  # fmt: skip
