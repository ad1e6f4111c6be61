"""Plots of what was measured, in one style."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cogx_fast.measure.timing import Interval

COLOURS = {"ours": "#2463a8", "peer": "#9aa0a6", "other": "#d1651b"}


def figure(rows: int, columns: int = 1, *, height: float, title: str) -> tuple[Any, Any]:
    """A figure and its axes, outside matplotlib's global state.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    made = Figure(figsize=(9, height), layout="constrained", facecolor="#fafaf8")
    axes = made.subplots(rows, columns, squeeze=False)
    for each in axes.flat:
        each.set_facecolor("#fafaf8")
        each.grid(color="#e2e2de", linewidth=0.8)
        each.set_axisbelow(True)
        each.tick_params(labelsize=8, length=0)
        for side, spine in each.spines.items():
            spine.set_visible(side in ("left", "bottom"))
    made.suptitle(title, fontsize=10, x=0.02, ha="left", parse_math=False)
    return made, axes


def ratios(path: Path, bars: Sequence[tuple[str, Interval, str]], *, title: str, label: str) -> str:
    """Horizontal bars with confidence intervals beside a line at 1.

    Args:
        path: the picture to write.
        bars: (name, ratio, a key of ``COLOURS``) from top to bottom.
        title: line at the top.
        label: of the axis.

    Returns:
        What was done, in a sentence.
    """
    try:
        made, axes = figure(1, height=1.4 + 0.32 * len(bars), title=title)
    except ModuleNotFoundError:
        return "no plot: matplotlib is not installed (pip install 'cogx-fast[plot]')"
    axis = axes[0, 0]
    for place, (_, ratio, kind) in enumerate(bars):
        spread = [[ratio.median - ratio.low], [ratio.high - ratio.median]]
        axis.barh(place, ratio.median, xerr=spread, color=COLOURS[kind], height=0.62, ecolor="#202124", capsize=2)
        axis.annotate(
            f"{ratio.median:.3f}", (ratio.high, place), xytext=(5, -3), textcoords="offset points", fontsize=8
        )
    axis.axvline(1, color="#202124", linewidth=0.8)
    axis.set_yticks(range(len(bars)), [name for name, _, _ in bars])
    axis.set_xlim(0, 1.15 * max([1.0, *(ratio.high for _, ratio, _ in bars)]))
    axis.invert_yaxis()
    axis.set_xlabel(label, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    made.savefig(path, dpi=150)
    return f"plot: {path}"
