"""What is said of a case, and what of it is held.

Errors are norms relative to fp32's; of a block, to what it adds to the stream, which would hide them. Held is, for each
size, fp32 code to ``FP32_LIMIT``; every other code to its recorded error, either way, and to eager execution's own; a
block to the recorded distance from the same roundings done plainly.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import gate
from cogx_fast.terminal import table

FP32_LIMIT = 6e-7
"""Of the error of fp32 code that is not quantized."""
EAGER_MARGIN = 1.1
"""How many times the error of eager execution, in the same dtype and recipe, the code may have."""
MARGINS = {"error": 0.02, "rounded": 0.5}
"""Of recorded errors: either way, and of the distance from a plain rounding upwards."""
LEAST_ROUNDED = 1e-3
"""Distances from a plain rounding are held from here on. They are made by values that another order of sums puts on the
other side of a rounding, and which these are differs from processor to processor."""

Figures = Mapping[str, float]
"""``error``: against fp32, eager. ``eager``: eager execution's in the same dtype and recipe. ``rounded``: of a block,
against fp32 with the same roundings done plainly."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One size of a case."""

    case: str
    size: str
    figures: Figures
    graphs: int
    """Generated so far: sizes that share one leave it as it is."""
    launches: int
    """Of generated kernels."""
    library: int
    """Library calls."""
    candidates: int
    """Configurations that were run; the figures are those of the worst."""
    source: str
    """Hash of the generated code."""
    seconds: float
    """Of the processor: to lower, run and compare."""

    @property
    def name(self) -> str:
        """The case and its size, as the table has them."""
        return f"{self.case} {self.size}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return dataclasses.asdict(self)


def is_exact(case: str) -> bool:
    """Whether the case's code has no roundings but fp32's own."""
    from benchmarks.numerics.cases import CASES

    return CASES[case].dtype == "float32" and CASES[case].recipe is None


def recorded_figures(case: str) -> tuple[str, ...]:
    """Which figures the table holds; of exact code none, for it has limits."""
    from benchmarks.numerics.cases import CASES

    if is_exact(case):
        return ()
    return ("error", "rounded") if CASES[case].part == "block" else ("error",)


def wrong(case: str, figures: Figures, recorded: Figures | None = None) -> list[str]:
    """Why a result is wrong, in sentences.

    Args:
        case: its name.
        figures: what was found.
        recorded: what was found before; None: only the limits hold.
    """
    limits = {"error": EAGER_MARGIN * figures["eager"]}
    if is_exact(case):
        limits = {"error": FP32_LIMIT, "rounded": FP32_LIMIT}
    found = [
        f"{name} is {figures[name]:.3e}, allowed is {limit:.3e}"
        for name, limit in limits.items()
        if not figures[name] <= limit
    ]
    for name in () if recorded is None else recorded_figures(case):
        margin = MARGINS[name]
        before, now = _held(name, recorded[name]), _held(name, figures[name])
        change = now - before if name == "rounded" else abs(now - before)
        if not change <= margin * before:
            found.append(f"{name} is {figures[name]:.3e}, recorded is {before:.3e}")
    return found


def measured(results: Sequence[Result]) -> gate.Measured:
    """What the table holds of them."""
    return {
        result.name: {
            **{name: _held(name, result.figures[name]) for name in recorded_figures(result.case)},
            "graphs": result.graphs, "launches": result.launches, "library": result.library,
            "candidates": result.candidates,
        }
        for result in results
    }  # fmt: skip


def notes(results: Sequence[Result]) -> gate.Measured:
    """What explains a difference."""
    return {result.name: {"source": result.source} for result in results}


def check(
    results: Sequence[Result], expected: Mapping[tuple[str, str], gate.Row], versions: Mapping[str, str]
) -> gate.Verdict:
    """Hold results against the limits and a table."""
    verdict = gate.compare(expected, measured(results), notes(results), versions)
    verdict.wins = [words for words in verdict.wins if " rounded: " not in words]
    verdict.replacement = verdict.replacement if verdict.regressions or verdict.wins or verdict.missing else []
    for result in results:
        verdict.regressions += [f"{result.name}: {words}" for words in wrong(result.case, result.figures)]
    return verdict


def text(results: Sequence[Result]) -> str:
    """The table for people."""
    header = ("case", "size", "error", "of eager", "rounded alike", "launches", "library", "configs", "graphs", "s")
    lines = [
        (
            result.case, result.size, *(f"{result.figures[name]:.2e}" for name in ("error", "eager", "rounded")),
            str(result.launches), str(result.library), str(result.candidates), str(result.graphs),
            f"{result.seconds:.1f}",
        )
        for result in results
    ]  # fmt: skip
    return table(header, lines)


def _held(name: str, number: float) -> float:
    """Four digits, which is more than holds from processor to processor."""
    least = LEAST_ROUNDED if name == "rounded" else 0.0
    return max(least, float(f"{number:.3e}")) if math.isfinite(number) else number


__all__ = [
    "EAGER_MARGIN", "FP32_LIMIT", "MARGINS", "Figures", "Result", "check", "is_exact", "measured", "notes",
    "recorded_figures", "text", "wrong",
]  # fmt: skip
