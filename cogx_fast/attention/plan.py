"""Attention plans: which 3-D window each layer and head has, and which denoising steps stay dense.

A plan speaks of frames and parts of the picture, so it means the same on every grid; the blocks that it keeps are
worked out for each grid when that is first seen. It belongs to one configuration, and is refused with another.

Suffixes: L layers, N heads.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cogx_fast.attention.attend import Rotary
from cogx_fast.attention.masks import SparseBlocks, sparse_blocks
from cogx_fast.attention.windows import Pattern, block_boxes, kept_blocks, token_order
from cogx_fast.config import TransformerConfig
from cogx_fast.model.tables import Grid
from cogx_fast.model.transformer import CogVideoXTransformer

FULL = Pattern(kind="full")
LAST_TIMESTEP = 1000.0
"""Timesteps go from here down to 0 as a video is denoised."""


class GridPlan(NamedTuple):
    """A plan on one grid, as the model takes it."""

    blocks: SparseBlocks
    joint_order_S: Tensor
    """Its order of tokens, for tables of the joint stream."""
    dense_above: float

    def mask(self, timestep_B: Tensor) -> SparseBlocks:
        """The masks of one call; decided on the device, so that nothing waits for a timestep that is there."""
        return self.blocks.dense_where(timestep_B.amax() >= self.dense_above)

    def reorder(self, rotary: Rotary | None, position_1SD: Tensor | None) -> tuple[Rotary | None, Tensor | None]:
        """Tables of the joint stream in the plan's order of tokens."""
        index_S = self.joint_order_S
        return (
            None if rotary is None else (rotary[0].index_select(0, index_S), rotary[1].index_select(0, index_S)),
            None if position_1SD is None else position_1SD.index_select(1, index_S),
        )


class PlanError(ValueError):
    """A plan that cannot be, or that belongs to another model; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class AttentionPlan:
    """Which pattern each layer and head has.

    Raises:
        PlanError: the parts do not fit together.
    """

    patterns: tuple[Pattern, ...]
    """The distinct ones. The first is ``full``: the dense steps use it."""
    choice: tuple[tuple[int, ...], ...]
    """For each layer, for each head (or once for all of them), the index of its pattern."""
    dense_above: float = 0.8 * LAST_TIMESTEP
    """Steps with a timestep of this and more attend to everything: in the first, the picture's layout is decided."""
    block_size: int = 128
    """Tokens in a block; GPU kernels want 128."""
    tile: tuple[int, int] = (2, 8)
    """Frames and rows of a block's box (``patterns.token_order``)."""
    config_hash: str | None = None
    """``hash_config`` of the model that it is for; None for a plan that fits any model of so many layers and heads."""
    weights_hash: str | None = None
    """``hash_weights`` of the model that it was found with; other weights give a warning."""
    origin: str = ""
    """How it came about, in words."""

    def __post_init__(self) -> None:
        if self.patterns[:1] != (FULL,) or FULL in self.patterns[1:]:
            raise PlanError("patterns of an attention plan must begin with the full one, and have it once")
        rows = {len(row) for row in self.choice}
        if len(rows) != 1 or 0 in rows:
            raise PlanError("choice of an attention plan must have a row for each layer, all of one length")
        if not all(0 <= index < len(self.patterns) for row in self.choice for index in row):
            raise PlanError(f"choice of an attention plan must hold indices of its {len(self.patterns)} patterns")
        if min(self.block_size, *self.tile) < 1:
            raise PlanError(f"block_size {self.block_size} and tile {self.tile} must be 1 or more")
        if math.isnan(self.dense_above):
            raise PlanError("dense_above must be a timestep, got NaN")

    def check(self, config: TransformerConfig, model: CogVideoXTransformer | None = None) -> None:
        """See that it is a plan for that configuration; warn where it was made with other weights than the model's.

        Raises:
            PlanError: it is not.
        """
        if self.config_hash is not None and self.config_hash != hash_config(config):
            raise PlanError(
                "the attention plan was made for a model of another configuration: make one for this model with "
                "`cogx-fast plan`, or use a built-in one (" + ", ".join(BUILT_IN) + ")"
            )
        layers, heads = len(self.choice), len(self.choice[0])
        if layers != config.num_layers or heads not in (1, config.num_attention_heads):
            raise PlanError(
                f"the attention plan has {layers} layers of {heads} heads, the model {config.num_layers} of "
                f"{config.num_attention_heads}: make one for this model with `cogx-fast plan`"
            )
        if model is not None and self.weights_hash is not None and self.weights_hash != hash_weights(model):
            warnings.warn(
                "the attention plan was made with other weights of the same configuration: its errors are not known "
                "for these; make one for them with `cogx-fast plan`",
                stacklevel=3,
            )

    def on_grid(self, grid: Grid, text_len: int, device: torch.device | None = None) -> GridPlan:
        """Order and masks on a grid of patches along (time, height, width), behind T = ``text_len`` text tokens."""
        order = token_order(grid, self.tile)
        boxes = block_boxes(grid, self.tile, text_len, self.block_size)
        keeps = [kept_blocks(pattern, boxes) for pattern in self.patterns]
        return GridPlan(
            sparse_blocks(keeps, torch.tensor(self.choice), self.block_size, order, device),
            torch.cat([torch.arange(text_len), text_len + order.order_V]).to(device),
            self.dense_above,
        )

    def kept(self, grid: Grid, text_len: int) -> Tensor:
        """The part of all blocks that each layer and head keeps on a grid, ``kept_LN`` (N is 1 if all are the same)."""
        boxes = block_boxes(grid, self.tile, text_len, self.block_size)
        kept_P = torch.stack([kept_blocks(pattern, boxes).double().mean() for pattern in self.patterns])
        return kept_P[torch.tensor(self.choice)]


def _uniform(name: str, pattern: Pattern, config: TransformerConfig) -> AttentionPlan:
    return AttentionPlan(patterns=(FULL, pattern), choice=((1,),) * config.num_layers, origin=f"built-in {name}")


BUILT_IN: dict[str, Callable[[TransformerConfig], AttentionPlan]] = {
    "radial": lambda config: _uniform("radial", Pattern(kind="radial", space=1 / 4), config),
    "tiles": lambda config: _uniform("tiles", Pattern(kind="tiles", frames=3, space=1 / 4), config),
}
"""Plans that need no profiling: every layer and head alike."""


def hash_config(config: TransformerConfig) -> str:
    """A short hash of a configuration."""
    return _digest(json.dumps(dataclasses.asdict(config), sort_keys=True).encode())


def hash_weights(model: CogVideoXTransformer) -> str:
    """A short hash of what tells one set of weights from another, whatever dtype they were loaded in.

    It is of the biases of embedding and head, rounded to bf16: small, and neither quantized nor changed by adapters.
    """
    parts = [
        parameter.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes()
        for name, parameter in sorted(model.named_parameters())
        if name.endswith(".bias") and name.startswith(("patch_embed.", "proj_out."))
    ]
    return _digest(b"".join(parts))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


__all__ = [
    "BUILT_IN", "FULL", "LAST_TIMESTEP", "AttentionPlan", "PlanError", "hash_config", "hash_weights"
]  # fmt: skip
