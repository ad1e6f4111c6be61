"""How good a video is: beside another one (PSNR, SSIM), by itself (steadiness), and whether it shows what was asked.

The last is for the tiny pipeline, whose videos are handwritten digits that move: a judge, fitted to real clips of the
training digits, reads the digit and the direction of motion.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cogx_fast.assets import digits
from cogx_fast.extras import require

Video: TypeAlias = "np.ndarray[Any, Any]"
"""Frames ``(F, H, W, 3)``: uint8, or floating point in 0…1."""

_LEAST_SIDE = 7
"""Pixels along a side of SSIM's window."""


def psnr(actual: Video, expected: Video) -> float:
    """Peak signal-to-noise ratio in dB over all values; infinite where they are equal.

    Raises:
        ValueError: the videos differ in size or length.
        MissingDependencyError: scikit-image is not installed.
    """
    metrics = require("skimage.metrics", why="to compare videos")
    _check_shapes(actual, expected)
    error = np.mean([metrics.mean_squared_error(a, b) for a, b in _frames(actual, expected)])
    return float("inf") if error == 0 else -10 * float(np.log10(error))


def ssim(actual: Video, expected: Video) -> float:
    """Structural similarity (Wang et al. 2004), mean of the frames': 1 where they are equal.

    Raises:
        ValueError: the videos differ in size or length, or are smaller than 7 pixels.
        MissingDependencyError: scikit-image is not installed.
    """
    metrics = require("skimage.metrics", why="to compare videos")
    _check_shapes(actual, expected)
    height, width = np.shape(actual)[1:3]
    if min(height, width) < _LEAST_SIDE:
        raise ValueError(f"videos are {height} × {width}, expected {_LEAST_SIDE} pixels or more a side, SSIM's window")
    values = [
        metrics.structural_similarity(a, b, channel_axis=-1, data_range=1.0) for a, b in _frames(actual, expected)
    ]
    return float(np.mean(values))


def per_frame(actual: Video, expected: Video) -> list[tuple[float, float]]:
    """(PSNR in dB, SSIM) of each frame; raises as ``psnr`` does."""
    _check_shapes(actual, expected)
    pairs = zip(actual, expected, strict=True)
    return [(psnr(a[None], b[None]), ssim(a[None], b[None])) for a, b in pairs]


def temporal_consistency(video: Video) -> float:
    """How much each frame is like the one before: mean SSIM of neighbours, 1 for a still picture.

    It falls with motion as with flicker: compare videos of one prompt and seed, not of different ones.

    Raises:
        ValueError: fewer than two frames.
        MissingDependencyError: scikit-image is not installed.
    """
    if len(video) < 2:
        raise ValueError(f"the video has {len(video)} frame: consistency over time needs two or more")
    return ssim(video[1:], video[:-1])


def _frames(actual: Video, expected: Video) -> Iterator[tuple[Video, Video]]:
    """Pairs of frames in float64, one after the other: two long videos at once would fill the memory."""
    for first, second in zip(actual, expected, strict=True):
        yield _unit(np.asarray(first)), _unit(np.asarray(second))


def _check_shapes(actual: Video, expected: Video) -> None:
    first, second = np.shape(actual), np.shape(expected)
    if first != second:
        raise ValueError(
            f"videos of shape {first} and {second} (frames, height, width, channels) cannot be compared: "
            "make them of one size and length"
        )


def _unit(video: Video) -> Video:
    """As float64 in 0…1."""
    return video.astype(np.float64) / (255 if video.dtype == np.uint8 else 1)


# -- does it show what was asked ---------------------------------------------------------------------------------------

MOTIONS = tuple(digits.MOTIONS)
_FIT_PLACES = 3
"""Real frames of each training digit that the judge is fitted to."""
_FIT_SEED = 1
_WINDOW, _FEATURE_SIDE = 32, 14
_DARK = 0.25
"""Brightness below this is background."""
_LEAST_MASS = 20.0
"""Sum of the brightness over a frame with a digit in it, at least; the thinnest real "one" has several times that."""
_STILL = 8.0
"""Pixels from first to last frame: less is standing still. Real motions are 16 to 32."""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What a clip shows, as the judge reads it."""

    digit: int | None
    """From the scores of all frames together; None where the clip is blank."""
    motion: str
    """One of ``MOTIONS``."""
    frame_digits: tuple[int | None, ...]
    """Of each frame by itself."""

    @property
    def agreement(self) -> float:
        """Part of the frames that show the clip's digit."""
        return sum(digit == self.digit is not None for digit in self.frame_digits) / len(self.frame_digits)

    def __str__(self) -> str:
        return "nothing" if self.digit is None else f"{digits.DIGITS[self.digit]}, {self.motion}"


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """How many clips show what was asked."""

    count: int
    digit: float
    motion: float
    frame_agreement: float
    """Mean part of a clip's frames that show the clip's digit."""
    digit_by_motion: dict[str, float]
    """Digit accuracy of the clips of each motion asked for."""
    digit_by_digit: dict[int, float]

    @property
    def digit_error(self) -> float:
        """Standard error of the digit accuracy."""
        return float(np.sqrt(self.digit * (1 - self.digit) / self.count))


class Judge:
    """Reads digit and motion of clips of the tiny pipeline's kind; use the one from ``judge()``.

    A frame is cropped about its centre of brightness and reduced to 14 × 14; a support vector machine with radial
    kernel, fitted to real frames of the 1,500 training digits, scores the ten digits. Motion is how far the centre of
    brightness travels. It can say "blank", but takes any other picture for one of the ten digits: look at them too.
    """

    def __init__(self) -> None:
        svm = require("sklearn.svm", why="to judge videos of digits")
        pictures, labels = digits.load("train")
        generator = torch.Generator().manual_seed(_FIT_SEED)
        chosen = torch.arange(len(pictures)).repeat(_FIT_PLACES)
        still = torch.full_like(chosen, MOTIONS.index("standing still"))
        clips = digits.draw_clips(chosen, still, generator, frames=1)
        frames = digits.render(clips, pictures, frames=1)[:, 0]
        self._machine = svm.SVC(C=10.0, gamma="scale", decision_function_shape="ovr")
        self._machine.fit(features(frames).numpy(), labels[chosen].numpy())

    def __call__(self, video: Video) -> Judgement:
        """Read one clip of two or more frames."""
        frames = torch.from_numpy(_unit(np.asarray(video)).mean(-1)).float().clamp(0, 1)
        is_blank = (frames * (frames > _DARK)).sum(dim=(1, 2)) < _LEAST_MASS
        scores = self._machine.decision_function(features(frames).numpy())
        found: list[int | None] = [
            None if blank else int(row.argmax()) for row, blank in zip(scores, is_blank, strict=True)
        ]
        seen = scores[~is_blank.numpy()]
        clip_digit = int(seen.mean(0).argmax()) if 2 * len(seen) > len(scores) else None
        return Judgement(digit=clip_digit, motion=read_motion(frames), frame_digits=tuple(found))


@functools.cache
def judge() -> Judge:
    """The judge, fitted on the first call (a few seconds), always in the same way.

    Raises:
        MissingDependencyError: scikit-learn is not installed.
    """
    return Judge()


def measure(videos: Sequence[Video], asked: Sequence[tuple[int, str]]) -> Accuracy:
    """Judge clips against what was asked for, a (digit, motion) for each.

    Raises:
        ValueError: no clips, or not as many as were asked for.
        MissingDependencyError: scikit-learn is not installed.
    """
    if not len(videos) or len(videos) != len(asked):
        raise ValueError(f"{len(videos)} videos for {len(asked)} prompts: one or more are needed, one for each")
    read = judge()
    found = [read(video) for video in videos]
    right = np.array([f.digit == digit for f, (digit, _) in zip(found, asked, strict=True)])
    motions, wanted = np.array([motion for _, motion in asked]), np.array([digit for digit, _ in asked])
    return Accuracy(
        count=len(found),
        digit=float(right.mean()),
        motion=float(np.mean([f.motion == motion for f, (_, motion) in zip(found, asked, strict=True)])),
        frame_agreement=float(np.mean([f.agreement for f in found])),
        digit_by_motion={name: float(right[motions == name].mean()) for name in MOTIONS if (motions == name).any()},
        digit_by_digit={digit: float(right[wanted == digit].mean()) for digit in range(10) if (wanted == digit).any()},
    )


def real_clips(count: int, *, seed: int = 0) -> tuple[list[Video], list[tuple[int, str]]]:
    """Clips of held-out digits, which neither the tiny pipeline nor the judge has seen, and what they show.

    Args:
        count: how many; each of the 297 digits appears once before any appears twice.
        seed: of speeds and places.
    """
    pictures, labels = digits.load("held-out")
    chosen, motions = torch.arange(count) % len(pictures), torch.arange(count) % len(MOTIONS)
    clips = digits.draw_clips(chosen, motions, torch.Generator().manual_seed(seed))
    grey = digits.render(clips, pictures)
    videos = [clip[..., None].expand(-1, -1, -1, 3).numpy() for clip in grey]
    return videos, [(int(labels[i]), MOTIONS[int(m)]) for i, m in zip(chosen, motions, strict=True)]


def features(frames_BHW: Tensor) -> Tensor:
    """Each frame about its centre of brightness, as ``(B, 196)``; places fall out of it."""
    height, width = frames_BHW.shape[1:]
    centre_B2 = centres(frames_BHW)
    offset = torch.arange(_WINDOW) - (_WINDOW - 1) / 2
    x, y = centre_B2[:, :1] + offset, centre_B2[:, 1:] + offset
    grid = torch.stack(
        torch.broadcast_tensors(x[:, None, :] / (width - 1) * 2 - 1, y[:, :, None] / (height - 1) * 2 - 1), dim=-1
    )
    window = F.grid_sample(frames_BHW[:, None], grid, mode="bilinear", padding_mode="zeros", align_corners=True)
    return F.interpolate(window, size=(_FEATURE_SIDE, _FEATURE_SIDE), mode="area").flatten(1)


def centres(frames_BHW: Tensor) -> Tensor:
    """Centre of brightness of each frame (x, y) in pixels, ``(B, 2)``; the middle where all is dark."""
    light = frames_BHW * (frames_BHW > _DARK)
    height, width = frames_BHW.shape[1:]
    mass = light.sum(dim=(1, 2))
    x = (light.sum(1) * torch.arange(width)).sum(1) / mass.clamp(min=1e-6)
    y = (light.sum(2) * torch.arange(height)).sum(1) / mass.clamp(min=1e-6)
    middle = torch.tensor([(width - 1) / 2, (height - 1) / 2])
    return torch.where(mass[:, None] > 0, torch.stack([x, y], dim=1), middle)


def read_motion(frames_FHW: Tensor) -> str:
    """Which of ``MOTIONS``, from a line through the centres of brightness over time."""
    count = len(frames_FHW)
    time = torch.arange(count) - (count - 1) / 2
    travel = (time[:, None] * centres(frames_FHW)).sum(0) / (time**2).sum().clamp(min=1) * (count - 1)
    if travel.norm() < _STILL:
        return "standing still"
    directions = {name: torch.tensor(way) for name, way in digits.MOTIONS.items() if any(way)}
    return max(directions, key=lambda name: float(travel @ directions[name]))


__all__ = [
    "MOTIONS", "Accuracy", "Judge", "Judgement", "Video", "centres", "features", "judge", "measure", "per_frame",
    "psnr", "read_motion", "real_clips", "ssim", "temporal_consistency",
]  # fmt: skip
