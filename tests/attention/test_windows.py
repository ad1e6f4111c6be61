"""Windows and the order of tokens against definitions written out token by token."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from cogx_fast.attention.windows import KINDS, Pattern, block_boxes, kept_blocks, token_order
from cogx_fast.model.tables import Grid
from tests.cases import for_each

ODD: list[tuple[Grid, tuple[int, int], int, int]] = [  # grid, tile, text tokens, block size
    ((5, 7, 9), (2, 4), 11, 16),
    ((3, 5, 4), (2, 2), 8, 8),
    ((1, 6, 10), (2, 8), 3, 16),
    ((7, 1, 13), (3, 4), 20, 8),
    ((4, 4, 4), (2, 2), 16, 8),
]
PATTERNS = [
    Pattern(kind="full"), Pattern(kind="spatial"), Pattern(kind="spatial", frames=1), Pattern(kind="temporal"),
    Pattern(kind="temporal", space=0.2), Pattern(kind="tiles", frames=1, space=0.3), Pattern(kind="radial", space=0.5),
]  # fmt: skip


def places(grid: Grid, tile: tuple[int, int]) -> list[tuple[int, int, int]]:
    """(time, height, width) of the video tokens in the stream's order."""
    own = list(itertools.product(*map(range, grid)))
    return [own[index] for index in token_order(grid, tile).order_V.tolist()]


def within_reach(pattern: Pattern, a: tuple[int, int, int], b: tuple[int, int, int], grid: Grid) -> bool:
    """The definition of each window for two tokens, in words of its own."""
    time = abs(a[0] - b[0])
    space = max(abs(a[1] - b[1]) / grid[1], abs(a[2] - b[2]) / grid[2])
    doublings = 0 if time < 2 else time.bit_length() - 1
    return {
        "full": True,
        "spatial": time <= pattern.frames,
        "temporal": space <= pattern.space,
        "tiles": time <= pattern.frames and space <= pattern.space,
        "radial": space <= pattern.space / 2**doublings,
    }[pattern.kind]


@for_each("grid, tile, text_len, block", ODD)
def test_order_and_its_inverse(grid: Grid, tile: tuple[int, int], text_len: int, block: int) -> None:
    order = token_order(grid, tile)
    assert sorted(order.order_V.tolist()) == list(range(math.prod(grid)))
    assert torch.equal(order.order_V[order.restore_V], torch.arange(math.prod(grid)))


def test_any_run_of_a_block_is_a_small_box() -> None:
    """At 5b's grid, wherever a block begins: mean extent near 2 × 8 × 8, never across the frame."""
    grid: Grid = (13, 30, 45)
    for text_len in (0, 226, 77):
        boxes = block_boxes(grid, (2, 8), text_len, 128)
        extent = (boxes.high_Q3 - boxes.low_Q3 + 1)[~boxes.has_text_Q].double()
        assert extent.mean(0).tolist() == pytest.approx([2, 8.7, 9.5], abs=0.3)
        assert extent.amax(0).tolist() <= [4, 15, 23]


@for_each("pattern", PATTERNS, "grid, tile, text_len, block", ODD)
def test_a_block_is_kept_if_and_only_if_its_box_is_within_reach(
    pattern: Pattern, grid: Grid, tile: tuple[int, int], text_len: int, block: int
) -> None:
    tokens: list[tuple[int, int, int] | None] = [None] * text_len + places(grid, tile)
    blocks = [tokens[start : start + block] for start in range(0, len(tokens), block)]
    kept = kept_blocks(pattern, block_boxes(grid, tile, text_len, block))
    assert kept.shape == (len(blocks), len(blocks))
    for i, j in itertools.product(range(len(blocks)), repeat=2):
        if None in blocks[i] + blocks[j]:
            assert kept[i, j], "text is dense both ways"
            continue
        cells_i, cells_j = (
            list(itertools.product(*(range(min(axis), max(axis) + 1) for axis in zip(*blocks[k], strict=True))))  # type: ignore[misc]
            for k in (i, j)
        )
        near = any(within_reach(pattern, a, b, grid) for a, b in itertools.product(cells_i, cells_j))
        assert bool(kept[i, j]) == near, (blocks[i], blocks[j])
        if any(within_reach(pattern, a, b, grid) for a, b in itertools.product(blocks[i], blocks[j])):  # type: ignore[arg-type]
            assert kept[i, j], "no pair of tokens within reach is left out"


def test_windows_leave_something_out_and_differ() -> None:
    boxes = block_boxes((13, 30, 45), (2, 8), 226, 128)
    kept = {str(pattern): kept_blocks(pattern, boxes) for pattern in PATTERNS}
    parts = {name: float(keep.double().mean()) for name, keep in kept.items()}
    assert parts.pop("full") == 1
    assert all(0.05 < part < 0.7 for part in parts.values()), parts
    assert len(set(parts.values())) == len(parts)
    assert all(torch.equal(keep, keep.T) and bool(keep.diagonal().all()) for keep in kept.values())


@for_each(
    "arguments, message",
    [
        ({"kind": "diagonal"}, "'diagonal', expected one of full, radial, tiles, spatial, temporal"),
        ({"kind": "full", "space": 0.5}, "'full' takes no space"),
        ({"kind": "temporal", "frames": 2}, "'temporal' takes no frames"),
        ({"kind": "radial", "space": -0.1}, "space of pattern 'radial' is -0.1, expected a number from 0"),
        ({"kind": "tiles", "frames": math.nan}, "expected a number from 0"),
    ],
)
def test_bad_patterns_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pattern(**arguments)  # type: ignore[arg-type]


def test_every_kind_is_tested() -> None:
    assert {pattern.kind for pattern in PATTERNS} == set(KINDS)
