"""Block masks for flex-attention."""

from __future__ import annotations

import torch
from torch.nn.attention.flex_attention import BlockMask

_WHOLE = 1 << 30


def full_block_mask(device: torch.device | str) -> BlockMask:
    """A mask that hides nothing, as one block over the whole sequence, for any number of tokens.

    ``flex_attention`` makes the same one when it is given none, but inside the graph, where it costs two launches.
    """
    ones = torch.ones(1, 1, 1, dtype=torch.int32, device=device)
    zeros = torch.zeros(1, 1, 1, 1, dtype=torch.int32, device=device)
    return BlockMask.from_kv_blocks(ones, zeros, BLOCK_SIZE=(_WHOLE, _WHOLE), seq_lengths=(1, 1))
