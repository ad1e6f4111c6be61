"""3-D windows over the grid of video tokens, in whole blocks, and the order of tokens that makes blocks compact.

Flex-attention skips blocks of keys, so a window is worth what it leaves out in whole blocks. Tokens in their own order
(time, height, width) make blocks that are rows across the frame, near to nothing in particular. ``token_order`` puts
them, once and for all layers, into slabs of frames and bands of rows run through column by column, to and fro: any
``block_size`` tokens that follow each other are then a small box of video, wherever they begin. So no token is padded
for, whatever the grid and the length of the text.

A pattern keeps a pair of blocks or drops it whole: where the boxes around their tokens come within its reach, or where
one of them holds a text token. Every pair of tokens within reach is therefore attended to, and some around it.

The windows are those of Sparse VideoGen (arXiv:2502.01776; spatial, temporal), Sliding Tile Attention
(arXiv:2502.04507; tiles) and Radial Attention (arXiv:2506.19852; radial), here at block granularity and symmetric.

Suffixes: V video tokens, S joint tokens (text first), Q blocks of the joint stream.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from cogx_fast.model.tables import Grid

Kind = Literal["full", "radial", "tiles", "spatial", "temporal"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_TAKES: dict[str, tuple[str, ...]] = {
    "full": (), "radial": ("space",), "tiles": ("frames", "space"), "spatial": ("frames",), "temporal": ("space",)
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """Which video tokens attend to which, in terms that mean the same on every grid.

    Raises:
        ValueError: an unknown kind, or a reach that its kind does not take or that is negative.
    """

    kind: Kind
    """``full``: all. ``spatial``: those at most ``frames`` away in time. ``temporal``: those at most ``space`` away in
    space. ``tiles``: both. ``radial``: those at most ``space`` away in the same and the next frame, and half as far
    each time that the distance in time doubles."""
    frames: float = 0.0
    """Reach in time, in latent frames (patches along time)."""
    space: float = 0.0
    """Reach in space along both axes, as a part of the frame's height and width."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"pattern is of kind {self.kind!r}, expected one of {', '.join(KINDS)}")
        for name in ("frames", "space"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} of pattern {self.kind!r} is {value}, expected a number from 0")
            if value and name not in _TAKES[self.kind]:
                raise ValueError(f"pattern {self.kind!r} takes no {name}, got {value}: leave it out")

    def __str__(self) -> str:
        reach = " ".join(f"{name} {getattr(self, name):.3g}" for name in _TAKES[self.kind] if getattr(self, name))
        return f"{self.kind} {reach}".rstrip()

    def keeps(self, time_gap: Tensor, space_gap: Tensor) -> Tensor:
        """Whether tokens (or boxes) so far from each other are within reach.

        Args:
            time_gap: frames between them, 0 where they share one.
            space_gap: the larger of their distances along height and width, as a part of the frame.
        """
        match self.kind:
            case "full":
                return torch.ones_like(time_gap, dtype=torch.bool)
            case "spatial":
                return time_gap <= self.frames
            case "temporal":
                return space_gap <= self.space
            case "tiles":
                return (time_gap <= self.frames) & (space_gap <= self.space)
            case _:  # radial
                halvings = time_gap.clamp(min=1).log2().floor()
                return space_gap <= self.space * 0.5**halvings


class TokenOrder(NamedTuple):
    """The video tokens' places in the stream, and the way back."""

    order_V: Tensor
    """For each place the token that stands there, counted as (time, height, width)."""
    restore_V: Tensor
    """For each token its place."""


def token_order(grid: Grid, tile: tuple[int, int]) -> TokenOrder:
    """Tokens in slabs of frames and bands of rows, each band run through column by column, to and fro.

    Args:
        grid: patches along (time, height, width).
        tile: frames of a slab and rows of a band, at most; all are of one size or one less. A block's tokens are then
            a box of about ``tile`` and ``block_size / (tile[0] · tile[1])`` columns.
    """
    frames, height, width = grid
    slabs, bands = -(-frames // tile[0]), -(-height // tile[1])
    time, row, column = (each.flatten() for each in torch.meshgrid(*map(torch.arange, grid), indexing="ij"))
    slab, band = time * slabs // frames, row * bands // height
    run = slab * bands + torch.where(slab % 2 == 0, band, bands - 1 - band)
    run_column = torch.where(run % 2 == 0, column, width - 1 - column)
    order_V = (((run * width + run_column) * frames + time) * height + row).argsort()
    return TokenOrder(order_V, order_V.argsort())


class Boxes(NamedTuple):
    """For each block of the joint stream the box around its video tokens."""

    low_Q3: Tensor
    """The least (time, height, width) of a block's video tokens."""
    high_Q3: Tensor
    """The greatest."""
    has_text_Q: Tensor
    """True for blocks with a text token."""
    grid: Grid


def block_boxes(grid: Grid, tile: tuple[int, int], text_len: int, block_size: int) -> Boxes:
    """The boxes of every block of ``block_size`` tokens, text first, then the video tokens in ``token_order``."""
    order_V = token_order(grid, tile).order_V
    _, height, width = grid
    places_V3 = torch.stack([order_V // (height * width), order_V // width % height, order_V % width], dim=1)
    tokens = text_len + len(order_V)
    blocks = -(-tokens // block_size)
    beyond = 1 << 30  # stands for what is no video token: text before, nothing behind

    def gather(fill: int) -> Tensor:
        padded = torch.full((blocks * block_size, 3), fill)
        padded[text_len:tokens] = places_V3
        return padded.unflatten(0, (blocks, block_size))

    has_text_Q = torch.arange(blocks) * block_size < text_len
    return Boxes(gather(beyond).amin(1), gather(-beyond).amax(1), has_text_Q, grid)


def kept_blocks(pattern: Pattern, boxes: Boxes) -> Tensor:
    """Which blocks of queries meet which blocks of keys, ``keep_QQ``: symmetric, with the diagonal."""
    low, high = boxes.low_Q3, boxes.high_Q3
    gap_QQ3 = (low[:, None] - high[None]).maximum(low[None] - high[:, None]).clamp(min=0).float()
    space_gap = (gap_QQ3[..., 1:] / torch.tensor(boxes.grid[1:])).amax(-1)
    has_text = boxes.has_text_Q
    return pattern.keeps(gap_QQ3[..., 0], space_gap) | has_text[:, None] | has_text[None]


__all__ = [
    "KINDS", "Boxes", "Kind", "Pattern", "TokenOrder", "block_boxes", "kept_blocks", "token_order"
]  # fmt: skip
