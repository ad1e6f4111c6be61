"""Block-sparse masks: flex-attention with them against a plain masked softmax, their count, their cost."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cogx_fast.attention.attend import attend
from cogx_fast.attention.masks import LayerBlocks, SparseBlocks, count_pairs, sparse_blocks
from cogx_fast.attention.windows import block_boxes, kept_blocks, token_order
from cogx_fast.model.tables import Grid
from tests.attention.test_attend import plain, qkv
from tests.attention.test_windows import ODD, PATTERNS
from tests.cases import for_each
from tests.model.pairs import TOLERANCE
from tests.support import relative_error

BLOCK = 16
GRIDS: list[tuple[Grid, int]] = [((5, 7, 9), 11), ((3, 5, 4), 8), ((4, 6, 8), 32)]


def masks(grid: Grid, text_len: int, tile: tuple[int, int] = (2, 4), block: int = BLOCK) -> tuple[SparseBlocks, Tensor]:
    """One layer whose heads have a pattern each, and the same as ``keep_NSS``, element by element."""
    boxes = block_boxes(grid, tile, text_len, block)
    keeps = [kept_blocks(pattern, boxes) for pattern in PATTERNS]
    tokens = text_len + grid[0] * grid[1] * grid[2]
    block_of = torch.arange(tokens) // block
    elements = torch.stack([keep[block_of][:, block_of] for keep in keeps])
    return sparse_blocks(keeps, torch.arange(len(keeps))[None], block, token_order(grid, tile)), elements


def run(q: Tensor, k: Tensor, v: Tensor, mask: LayerBlocks) -> Tensor:
    return attend(q, k, v, backend="flex", mask=mask.block_mask(q.shape[1]))


@pytest.fixture(scope="module")
def compiled() -> Callable[..., Tensor]:
    return torch.compile(run, fullgraph=True, dynamic=True)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@for_each("how", ["compiled", "eager"], "grid, text_len", GRIDS)
def test_flex_is_the_masked_softmax_for_every_pattern(
    grid: Grid, text_len: int, how: str, compiled: Callable[..., Tensor]
) -> None:
    blocks, elements = masks(grid, text_len)
    q, k, v = qkv(elements.shape[-1], heads=len(PATTERNS), width=32)
    k = k * 3  # sharp enough that a key too many or too few shows
    attention = compiled if how == "compiled" else run
    out = attention(q, k, v, blocks.of_layer(0))
    expected = plain(q, k, v, elements[None])
    for head, pattern in enumerate(PATTERNS):
        assert relative_error(out[:, :, head], expected[:, :, head]) <= TOLERANCE, str(pattern)
    dense = attention(q, k, v, blocks.dense_where(torch.tensor(True)).of_layer(0))
    assert relative_error(dense, plain(q, k, v)) <= TOLERANCE
    assert relative_error(out, dense) > 0.01


@for_each("grid, tile, text_len, block", ODD)
def test_counted_pairs_are_those_of_the_elements(grid: Grid, tile: tuple[int, int], text_len: int, block: int) -> None:
    blocks, elements = masks(grid, text_len, tile, block)
    for pattern, (keep, counts, columns) in enumerate(zip(elements, *blocks[:2], strict=True)):
        assert count_pairs(counts, columns, block, len(keep)) == int(keep.sum()), str(PATTERNS[pattern])


_BUILD = """
import json, resource, time, torch
from cogx_fast.config import PRESETS
from cogx_fast.attention.windows import Pattern
from cogx_fast.attention.plan import FULL, AttentionPlan
config = PRESETS["1.5-5b"]
patterns = (FULL, *(Pattern(kind=kind, space=1 / n) for kind in ("radial", "temporal") for n in (2, 4, 8)),
            *(Pattern(kind="spatial", frames=n) for n in (0, 1, 3)))
choice = tuple(tuple((layer + head) % len(patterns) for head in range(48)) for layer in range(42))
plan = AttentionPlan(patterns=patterns, choice=choice)
plan.on_grid((2, 8, 8), 226)  # what torch loads on first use is not the mask's
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before, begin = peak(), time.process_time()
blocks = plan.on_grid((11, 48, 85), 226).blocks
seconds = time.process_time() - begin
held = sum(tensor.nbytes for tensor in (*blocks[:3], *blocks.order)) / 2**20
print(json.dumps({"seconds": seconds, "MB": peak() - before, "held": held, "blocks": blocks.counts_PQ.shape[1]}))
"""


def test_masks_of_1_5_are_built_in_little_time_and_memory() -> None:
    """45,106 tokens, ten patterns over 42 layers of 48 heads."""
    child = subprocess.run([sys.executable, "-c", _BUILD], capture_output=True, text=True, timeout=120)
    assert child.returncode == 0, child.stderr
    cost = json.loads(child.stdout)
    assert cost["blocks"] == 353
    assert cost["seconds"] <= 5
    assert cost["MB"] <= 256
    assert cost["held"] <= 8
