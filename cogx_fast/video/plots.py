"""Drawings of figures, as pictures: quality over frames, speed against quality.

Each returns a ``PIL.Image.Image``, and raises ``MissingDependencyError`` where matplotlib or pillow is not installed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cogx_fast.extras import require

_BACKGROUND, _INK, _FAINT, _GRID = "#fafaf8", "#202124", "#787a80", "#e2e2de"
_COLOURS = ("#2463a8", "#d1651b", "#3a8a4d", "#8a4fa3")
_DPI = 150
_LEAST_RANGE = 2.0  # dB: less is drawn as the little that it is
_CEILING = 10.0  # dB from the best finite value to the line on which identical videos stand
_IDENTICAL_ALONE = 100.0  # dB at which that line is drawn where nothing differs


@dataclass(frozen=True, kw_only=True)
class Point:
    """A way to make a video: how fast, and how near to the reference."""

    name: str
    steps_per_second: float
    psnr_db: float
    """Infinite where it is the same video."""


def plot_frames(figures: Sequence[tuple[float, float]], *, fps: float, title: str) -> Any:
    """PSNR and SSIM of each frame over time.

    Args:
        figures: (PSNR in dB, SSIM) of each frame; PSNR is infinite where two frames are equal.
        fps: frames a second, for the time axis.
        title: line at the top.
    """
    figure, (upper, lower) = _figure(title, rows=2, height=3.9, sharex=True)
    seconds = np.arange(len(figures)) / fps
    psnr, ssim = np.array(figures, dtype=np.float64).T
    differs = np.isfinite(psnr)
    ceiling = _ceiling(psnr)
    upper.plot(seconds, np.where(differs, psnr, np.nan), "o-", color=_COLOURS[0], markersize=3.5, linewidth=1.4)
    if not differs.all():
        _draw_ceiling(upper, ceiling)
        upper.plot(seconds[~differs], np.full((~differs).sum(), ceiling), "o", color=_COLOURS[0], markersize=3.5)
    if differs.any():
        worst = int(psnr.argmin())
        upper.annotate(
            f"{psnr[worst]:.1f} dB, frame {worst + 1}", (seconds[worst], psnr[worst]), xytext=(0, -6),
            textcoords="offset points", ha=_side(worst, len(figures)), va="top", color=_INK, fontsize=8,
        )  # fmt: skip
        low, high = psnr[differs].min(), psnr[differs].max() if differs.all() else ceiling
        room = max(high - low, _LEAST_RANGE)
        upper.set_ylim(low - 0.35 * room, high + 0.15 * room)
    _keep_ticks(upper, psnr)
    upper.set_ylabel("PSNR, dB")
    lower.plot(seconds, ssim, "o-", color=_COLOURS[1], markersize=3.5, linewidth=1.4)
    room = max(1 - ssim.min(), 0.005)
    lower.set_ylim(1 - 1.2 * room, 1 + 0.15 * room)
    lower.ticklabel_format(axis="y", useOffset=False)
    lower.set_ylabel("SSIM")
    lower.set_xlabel("seconds")
    return _picture(figure)


def plot_speed(points: Sequence[Point], *, reference: Point, title: str) -> Any:
    """Speed against PSNR: what is to the right is faster, what is above nearer to the reference.

    Args:
        points: what is compared.
        reference: the one that PSNR is measured to; a line at its speed.
        title: line at the top.
    """
    figure, axes = _figure(title, rows=1, height=3.4)
    speeds = [reference.steps_per_second, *(point.steps_per_second for point in points)]
    psnr = np.array([point.psnr_db for point in points])
    ceiling = _ceiling(psnr)
    heights = np.where(np.isfinite(psnr), psnr, ceiling)
    if not np.isfinite(psnr).all():
        _draw_ceiling(axes, ceiling)
    axes.axvline(reference.steps_per_second, color=_FAINT, linestyle=(0, (4, 3)), linewidth=1)
    room = max(max(speeds) - min(speeds), 0.1 * max(speeds))
    axes.set_xlim(max(0.0, min(speeds) - 0.5 * room), max(speeds) + 0.5 * room)
    axes.set_ylim(0, max(heights) * 1.2)
    _keep_ticks(axes, psnr)
    axes.annotate(
        f"{reference.name}: the reference", (reference.steps_per_second, 0.03), xycoords=("data", "axes fraction"),
        xytext=(-5, 0), textcoords="offset points", rotation=90, ha="right", va="bottom", color=_FAINT, fontsize=8,
            bbox={"facecolor": _BACKGROUND, "edgecolor": "none", "pad": 1},
    )  # fmt: skip
    middle = sum(axes.get_xlim()) / 2
    for point, height, colour in zip(points, heights, _COLOURS, strict=False):
        axes.plot(point.steps_per_second, height, "o", color=colour, markersize=9, zorder=3)
        right = point.steps_per_second <= middle
        decibels = f"{point.psnr_db:.1f} dB" if math.isfinite(point.psnr_db) else "identical"
        faster = point.steps_per_second / reference.steps_per_second
        axes.annotate(
            f"{point.name}\n{faster:.2f} × as fast, {decibels}", (point.steps_per_second, height),
            xytext=(10 if right else -10, -4), textcoords="offset points", ha="left" if right else "right", va="top",
            color=_INK, fontsize=9, linespacing=1.4,
        )  # fmt: skip
    axes.set_xlabel("denoising steps a second")
    axes.set_ylabel(f"PSNR to {reference.name}, dB")
    return _picture(figure)


@dataclass(frozen=True, kw_only=True)
class Mix:
    """A mix of schemes for a model's linears."""

    sqnr_db: float
    """Of the predicted noise."""
    time: float
    """Part of the unquantized linears' time."""
    bytes: float
    """Part of the unquantized linears' bytes."""


def plot_mixes(mixes: Sequence[Mix], *, best: Mix, budget_db: float, title: str) -> Any:
    """Quality of mixes against their estimated time and against their bytes; what is upper left is better.

    Args:
        mixes: what was measured.
        best: the one that was chosen; circled.
        budget_db: the least quality allowed; a line.
        title: line at the top.
    """
    figure, axes = _figure(title, rows=2, height=5.2)
    shown = [mix for mix in mixes if math.isfinite(mix.sqnr_db)]
    for each, key, label in ((axes[0], "time", "estimated time"), (axes[1], "bytes", "bytes")):
        each.axhline(budget_db, color=_FAINT, linestyle=(0, (4, 3)), linewidth=1)
        each.plot([getattr(mix, key) for mix in shown], [mix.sqnr_db for mix in shown], "o", color=_COLOURS[0])
        if math.isfinite(best.sqnr_db):
            each.plot(getattr(best, key), best.sqnr_db, "o", markersize=13, markerfacecolor="none", color=_COLOURS[1])
            each.annotate(
                f"{best.sqnr_db:.1f} dB at {getattr(best, key):.2f}", (getattr(best, key), best.sqnr_db),
                xytext=(0, 9), textcoords="offset points", ha="center", color=_INK, fontsize=8,
            )  # fmt: skip
        each.margins(0.12, 0.25)
        each.set_xlabel(f"{label} of the linears, of bf16's")
        each.set_ylabel("SQNR of the noise, dB")
    return _picture(figure)


def plot_schedule(bounds: Sequence[float], blocks: Sequence[int], *, error: float, title: str) -> Any:
    """The predicted error against how many steps are whole, with the chosen number, and which steps those are.

    Args:
        bounds: for 1, 2, … whole steps, as a part of the first.
        blocks: that each step of the chosen schedule computes.
        error: that was measured with it.
        title: line at the top.
    """
    figure, (upper, lower) = _figure(title, rows=2, height=4.4)
    whole = sum(1 for count in blocks if count)
    parts = np.arange(1, len(bounds) + 1) / len(bounds)
    shown = np.array(bounds) > 0
    upper.plot(parts[shown], np.array(bounds)[shown], "-", color=_COLOURS[0], linewidth=1.4)
    upper.set_yscale("log")
    upper.plot(parts[whole - 1], bounds[whole - 1], "o", color=_COLOURS[1], markersize=8)
    upper.annotate(
        f"{whole} of {len(bounds)} steps: measured {error:.3f}", (parts[whole - 1], bounds[whole - 1]),
        xytext=(10, 6), textcoords="offset points", color=_INK, fontsize=8,
    )  # fmt: skip
    upper.set_xlabel("part of the steps that is whole")
    upper.set_ylabel("predicted error, of one whole step's")
    lower.bar(range(1, len(blocks) + 1), blocks, color=_COLOURS[0])
    lower.set_xlabel("step")
    lower.set_ylabel("blocks computed")
    return _picture(figure)


def _figure(title: str, *, rows: int, height: float, sharex: bool = False) -> tuple[Any, Any]:
    """A figure of its own, outside matplotlib's global state, and its axes."""
    figure = require("matplotlib.figure", why="to draw plots").Figure(
        figsize=(6.4, height), dpi=_DPI, facecolor=_BACKGROUND, layout="constrained"
    )
    axes = figure.subplots(rows, 1, sharex=sharex)
    for each in np.atleast_1d(axes):
        each.set_facecolor(_BACKGROUND)
        each.grid(color=_GRID, linewidth=0.8)
        each.set_axisbelow(True)
        each.tick_params(colors=_FAINT, labelsize=8, length=0)
        for side, spine in each.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(_GRID)
        each.xaxis.label.set(color=_FAINT, size=8)
        each.yaxis.label.set(color=_FAINT, size=8)
    figure.suptitle(title, color=_INK, fontsize=10, x=0.02, ha="left", parse_math=False)
    return figure, axes


def _ceiling(psnr: Any) -> float:
    """Where to draw what is infinite."""
    finite = psnr[np.isfinite(psnr)]
    return float(finite.max()) + _CEILING if finite.size else _IDENTICAL_ALONE


def _draw_ceiling(axes: Any, height: float) -> None:
    axes.axhline(height, color=_FAINT, linestyle=(0, (1, 2)), linewidth=1)
    axes.annotate(
        "identical (∞ dB)", (1, height), xycoords=("axes fraction", "data"), xytext=(-2, 3),
        textcoords="offset points", ha="right", va="bottom", color=_FAINT, fontsize=8,
    )  # fmt: skip


def _keep_ticks(axes: Any, psnr: Any) -> None:
    """Only those that mean something: none near the line of what is infinite."""
    if not np.isfinite(psnr).all():
        low, high = axes.get_ylim()
        most = psnr[np.isfinite(psnr)].max(initial=-math.inf) + _CEILING / 2
        axes.set_yticks([tick for tick in axes.get_yticks() if low <= tick <= min(most, high)])


def _side(index: int, count: int) -> str:
    return "left" if index < count / 4 else "right" if index > 3 * count / 4 else "center"


def _picture(figure: Any) -> Any:
    canvas = require("matplotlib.backends.backend_agg", why="to draw plots").FigureCanvasAgg(figure)
    canvas.draw()
    image = require("PIL.Image", why="to draw plots")
    return image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


__all__ = ["Mix", "Point", "plot_frames", "plot_mixes", "plot_schedule", "plot_speed"]
