"""Two videos beside each other: figures, pictures, a plot."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cogx_fast.extras import require
from cogx_fast.sizes import VideoSize
from cogx_fast.video import plots, quality
from cogx_fast.video.files import Frames, contact_sheet, side_by_side, to_bytes, write_image, write_video

_MOST_GAIN = 64


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two."""

    name: str
    """"A", "B"."""
    words: str
    """What it is, in a few short lines."""
    frames: Frames
    """``(F, H, W, 3)``: uint8, or floats in 0…1."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How far two videos are apart."""

    psnr_db: float
    """Over all frames together; infinite where they are equal."""
    frames: tuple[tuple[float, float], ...]
    """(PSNR in dB, SSIM) of each frame."""
    steadiness: tuple[float, float] | None
    """Temporal consistency of each video by itself; None for single frames."""

    @property
    def ssim(self) -> float:
        """Mean of the frames'."""
        return float(np.mean([ssim for _, ssim in self.frames]))

    @property
    def worst(self) -> int:
        """Index of the frame with the least PSNR."""
        return int(np.argmin([psnr for psnr, _ in self.frames]))

    @property
    def identical_frames(self) -> int:
        """How many frames are equal."""
        return sum(psnr == float("inf") for psnr, _ in self.frames)

    @property
    def mean_psnr_db(self) -> float:
        """Mean of the PSNR of the frames that differ; infinite where none does."""
        finite = [psnr for psnr, _ in self.frames if psnr != float("inf")]
        return float(np.mean(finite)) if finite else float("inf")


def check_dependencies() -> None:
    """See at the start that everything is there that is needed in the end.

    Raises:
        MissingDependencyError: imageio-ffmpeg, pillow, matplotlib or scikit-image is not installed.
    """
    for module in ("imageio_ffmpeg", "PIL.Image", "matplotlib.figure", "skimage.metrics"):
        require(module, why="to compare videos")


def check_shapes(first: Frames, second: Frames, names: tuple[str, str]) -> None:
    """See that two videos can be compared frame by frame.

    Raises:
        ValueError: they differ in size or length; the message says what each is and what to do.
    """
    if first.shape == second.shape:
        return
    sizes = [VideoSize(frames=len(video), height=video.shape[1], width=video.shape[2]) for video in (first, second)]
    remedies = []
    if sizes[0].frames != sizes[1].frames:
        longer = int(sizes[1].frames > sizes[0].frames)
        remedies.append(f"cut {names[longer]} with ffmpeg's -frames:v {min(size.frames for size in sizes)}")
    if first.shape[1:] != second.shape[1:]:
        remedies.append(f"scale {names[1]} with ffmpeg's -vf scale={sizes[0].width}:{sizes[0].height}")
    raise ValueError(
        f"{names[0]} has {sizes[0]}, {names[1]} has {sizes[1]}: to compare them frame by frame make them of one "
        f"length and size ({' and '.join(remedies)}), or generate both anew with the same --frames, --height, --width"
    )


def compare_videos(first: Frames, second: Frames) -> Comparison:
    """The figures of two videos of one size and length.

    Raises:
        ValueError: they differ in size or length, or are smaller than 7 pixels.
        MissingDependencyError: scikit-image is not installed.
    """
    steadiness = None
    if len(first) > 1:
        steadiness = quality.temporal_consistency(first), quality.temporal_consistency(second)
    return Comparison(
        psnr_db=quality.psnr(first, second),
        frames=tuple(quality.per_frame(first, second)),
        steadiness=steadiness,
    )


def difference(first: Frames, second: Frames) -> tuple[Frames, int]:
    """How far each value is off, made brighter so that it can be seen.

    Returns:
        ``(F, H, W, 3)`` uint8, and the power of two by which differences are multiplied.
    """
    off = np.abs(to_bytes(first).astype(np.int16) - to_bytes(second))
    high = float(np.quantile(off, 0.99)) or float(off.max())
    gain = 1
    while gain < _MOST_GAIN and 0 < high * gain * 2 <= 255:
        gain *= 2
    return (off * gain).clip(0, 255).astype(np.uint8), gain


def write_comparison(
    directory: Path, sides: tuple[Side, Side], comparison: Comparison, *, title: str, note: str, fps: float
) -> dict[str, Path]:
    """Write both videos and their difference side by side, as a contact sheet, and a plot of the figures.

    Args:
        directory: where to; it is there.
        sides: the two videos.
        comparison: their figures.
        title: line at the top of the pictures.
        note: line at the bottom of the contact sheet.
        fps: frames a second.

    Returns:
        The files by what they are: "video", "contact_sheet", "plot".
    """
    files = {
        "video": directory / "side_by_side.mp4",
        "contact_sheet": directory / "contact_sheet.png",
        "plot": directory / "frames.png",
    }
    off, gain = difference(sides[0].frames, sides[1].frames)
    label = f"difference × {gain}" if gain > 1 else "difference"
    panels = [*((f"{side.name}: {', '.join(side.words.splitlines())}", side.frames) for side in sides), (label, off)]
    write_video(files["video"], side_by_side(panels), fps=fps)
    rows = [*((side.name, side.words, side.frames) for side in sides), ("A – B", label, off)]
    write_image(files["contact_sheet"], contact_sheet(rows, title=title, note=note, fps=fps))
    write_image(files["plot"], plots.plot_frames(comparison.frames, fps=fps, title="A and B, frame by frame"))
    return files


__all__ = [
    "Comparison", "Side", "check_dependencies", "check_shapes", "compare_videos", "difference", "write_comparison",
]  # fmt: skip
