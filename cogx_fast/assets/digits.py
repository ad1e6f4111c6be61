"""What the tiny pipeline shows: handwritten digits that move over a dark canvas, and the prompts for them.

The digits are those of scikit-learn's ``load_digits`` (8 × 8 pixels, by 13 people), 1,500 to train on and 297 held out.

Suffixes: B clips, F frames, H/W canvas height and width, P pixels along a side of a digit.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cogx_fast.extras import require

Split = Literal["train", "held-out"]

CANVAS, FRAMES, SIDE = 64, 17, 28
TRAIN_COUNT = 1500
SPLIT_SEED = 0
CONTRAST = 1.25
SPEED = (1.0, 2.0)
"""Pixels a frame, least and most."""
WANDER = 8.0
"""The middle of a path is at most so many pixels, in each direction, from the middle of the canvas."""

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MOTIONS = {
    "moving left": (-1.0, 0.0), "moving right": (1.0, 0.0), "moving up": (0.0, -1.0), "moving down": (0.0, 1.0),
    "standing still": (0.0, 0.0),
}  # fmt: skip
"""Words and direction (x to the right, y downwards)."""


def prompt(digit: int, motion: str) -> str:
    """The words for a clip, e.g. "the digit seven moving left"."""
    return f"the digit {DIGITS[digit]} {motion}"


def all_prompts() -> list[tuple[int, str, str]]:
    """Every (digit, motion, prompt): ten digits, five motions."""
    return [(digit, motion, prompt(digit, motion)) for digit in range(10) for motion in MOTIONS]


@functools.cache
def load(split: Split) -> tuple[Tensor, Tensor]:
    """The digits of a split: pictures ``(count, P, P)`` in 0…1, black background, and labels ``(count,)``.

    Raises:
        MissingDependencyError: scikit-learn is not installed.
    """
    data = require("sklearn.datasets", why="for the pictures of digits").load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(SPLIT_SEED))
    chosen = order[:TRAIN_COUNT] if split == "train" else order[TRAIN_COUNT:]
    small = torch.from_numpy(data.images).float()[chosen] / 16
    pictures = F.interpolate(small[:, None], size=(SIDE, SIDE), mode="bicubic", align_corners=False)[:, 0]
    return (pictures * CONTRAST).clamp(0, 1), torch.from_numpy(data.target)[chosen].long()


@dataclass(frozen=True, kw_only=True)
class Clips:
    """Which digit moves from where to where, for B clips."""

    picture: Tensor
    """Index into the split's pictures, ``(B,)``."""
    motion: Tensor
    """Index into ``MOTIONS``, ``(B,)``."""
    start: Tensor
    """Left and top edge in the first frame, in pixels, ``(B, 2)``."""
    velocity: Tensor
    """Pixels a frame, ``(B, 2)``."""

    def __len__(self) -> int:
        return len(self.picture)

    def part(self, chosen: slice | Tensor) -> Clips:
        """Some of the clips."""
        return Clips(
            picture=self.picture[chosen], motion=self.motion[chosen], start=self.start[chosen],
            velocity=self.velocity[chosen],
        )  # fmt: skip


def draw_clips(
    pictures: Tensor, motions: Tensor, generator: torch.Generator, *, canvas: int = CANVAS, frames: int = FRAMES
) -> Clips:
    """Random speeds and places for given digits and motions: paths about the middle, within the canvas.

    Args:
        pictures: index of each clip's picture ``(B,)``.
        motions: index of each clip's motion ``(B,)``.
        generator: where the randomness comes from.
        canvas: pixels along a side; where the path is longer it is centred, and the digit enters and leaves.
        frames: length of the clips.
    """
    count = len(pictures)
    speed = torch.empty(count, 1).uniform_(*SPEED, generator=generator)
    velocity = torch.tensor(list(MOTIONS.values()))[motions] * speed
    travel = velocity * (frames - 1)
    room = ((canvas - SIDE - travel.abs()) / 2).clamp(0, WANDER)
    offset = room * torch.empty(count, 2).uniform_(-1, 1, generator=generator)
    start = (canvas - SIDE) / 2 + offset - travel / 2
    return Clips(picture=pictures, motion=motions, start=start, velocity=velocity)


def render(clips: Clips, pictures: Tensor, *, canvas: int = CANVAS, frames: int = FRAMES) -> Tensor:
    """The clips as grey video ``(B, F, H, W)`` in 0…1, moved by parts of pixels with bilinear weights."""
    time = torch.arange(frames)[:, None]
    position_BF2 = clips.start[:, None] + clips.velocity[:, None] * time
    pixel, source = torch.arange(canvas)[:, None], torch.arange(pictures.shape[-1])
    weight_BF2WP = (1 - (pixel - source - position_BF2[..., None, None]).abs()).clamp(min=0)
    across_BFWP, down_BFHP = weight_BF2WP.unbind(2)
    return down_BFHP @ pictures[clips.picture][:, None] @ across_BFWP.mT


def boxes(clips: Clips, *, canvas: int = CANVAS, frames: int = FRAMES) -> Tensor:
    """Where the digit's square is in each frame, a mask ``(B, F, H, W)``."""
    return render(clips, torch.ones(int(clips.picture.max()) + 1, SIDE, SIDE), canvas=canvas, frames=frames) > 0


__all__ = [
    "CANVAS", "DIGITS", "FRAMES", "MOTIONS", "SIDE", "Clips", "Split", "all_prompts", "boxes", "draw_clips", "load",
    "prompt", "render",
]  # fmt: skip
