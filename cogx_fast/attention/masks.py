"""Block masks for flex-attention.

Suffixes: S joint tokens, N heads (1 where all are the same), L layers, P distinct patterns, Q blocks of the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, noop_mask

from cogx_fast.attention.windows import TokenOrder
from cogx_fast.model.tracing import is_traced

_WHOLE = 1 << 30


def full_block_mask(device: torch.device | str) -> BlockMask:
    """A mask that hides nothing, as one block over the whole sequence, for any number of tokens.

    ``flex_attention`` makes the same one when it is given none, but inside the graph, where it costs two launches.
    """
    ones = torch.ones(1, 1, 1, dtype=torch.int32, device=device)
    zeros = torch.zeros(1, 1, 1, 1, dtype=torch.int32, device=device)
    return BlockMask.from_kv_blocks(ones, zeros, BLOCK_SIZE=(_WHOLE, _WHOLE), seq_lengths=(1, 1))


class LayerBlocks(NamedTuple):
    """One layer's block-sparse mask: every distinct pattern of the model, and which of them each head has.

    A head's rows are gathered where they are used, so that no layer holds its own (1 GB at 1.5's size), and another
    choice, such as all dense, has the same shapes: the compiled graph stays the same.
    """

    counts_PQ: Tensor
    """Blocks of keys that each block of queries meets, int32."""
    columns_PQQ: Tensor
    """Which ones: the first ``counts`` of each row, int32."""
    choice_N: Tensor
    """Each head's pattern."""
    block_size: int

    def block_mask(self, tokens: int) -> BlockMask:
        """The mask of S = ``tokens`` queries and keys, for ``flex_attention``."""
        counts = self.counts_PQ.index_select(0, self.choice_N)[None]
        columns = self.columns_PQQ.index_select(0, self.choice_N)[None]
        # Blocks are kept whole, so the kernel has nothing to mask inside of them. Uncompiled, flex_attention computes
        # every score and sees nothing but the function.
        is_compiled = is_traced()
        return BlockMask(
            seq_lengths=(tokens, tokens),
            kv_num_blocks=counts,
            kv_indices=columns,
            full_kv_num_blocks=None,
            full_kv_indices=None,
            q_num_blocks=counts,  # patterns are symmetric
            q_indices=columns,
            full_q_num_blocks=None,
            full_q_indices=None,
            BLOCK_SIZE=(self.block_size, self.block_size),
            mask_mod=noop_mask if is_compiled else _element_mask(counts, columns, self.block_size),
        )


class SparseBlocks(NamedTuple):
    """The block-sparse masks of all layers, and the order of tokens that they are for. Pattern 0 keeps every block."""

    counts_PQ: Tensor
    columns_PQQ: Tensor
    choice_LN: Tensor
    block_size: int
    order: TokenOrder

    def of_layer(self, layer: int) -> LayerBlocks:
        """That layer's mask."""
        return LayerBlocks(self.counts_PQ, self.columns_PQQ, self.choice_LN[layer], self.block_size)

    def dense_where(self, dense: Tensor) -> SparseBlocks:
        """The same masks, or those that hide nothing where ``dense`` (one boolean, on the device) is True."""
        return self._replace(choice_LN=self.choice_LN.masked_fill(dense, 0))


def sparse_blocks(
    keeps: Sequence[Tensor],
    choice_LN: Tensor,
    block_size: int,
    order: TokenOrder,
    device: torch.device | None = None,
) -> SparseBlocks:
    """Masks from which blocks each distinct pattern keeps.

    Args:
        keeps: a boolean, symmetric ``keep_QQ`` for each pattern, the first all True.
        choice_LN: the pattern of each layer and head; N is 1 where all heads of a layer have the same.
        block_size: tokens in a block.
        order: of the video tokens.
        device: where to put them.
    """
    assert bool(keeps[0].all()), "pattern 0 keeps every block"
    counts = torch.stack([keep.sum(-1, dtype=torch.int32) for keep in keeps])
    columns = torch.stack([keep.byte().argsort(dim=-1, descending=True, stable=True).int() for keep in keeps])
    order = TokenOrder(order.order_V.to(device), order.restore_V.to(device))
    return SparseBlocks(counts.to(device), columns.to(device), choice_LN.to(device), block_size, order)


def count_pairs(counts_Q: Tensor, columns_QQ: Tensor, block_size: int, tokens: int) -> int:
    """Pairs of query and key that are computed: a block of queries times each block of keys it meets.

    The last block may be short. Attention's floating-point operations are 4 · K times this, for a head of width K.
    """
    lengths_Q = torch.full((len(counts_Q),), block_size)
    lengths_Q[-1] = tokens - block_size * (len(counts_Q) - 1)
    met = torch.arange(columns_QQ.shape[1]) < counts_Q[:, None].cpu()
    keys_Q = (lengths_Q[columns_QQ.long().cpu()] * met).sum(-1)
    return int((lengths_Q * keys_Q).sum())


def _element_mask(counts_1NQ: Tensor, columns_1NQQ: Tensor, block_size: int) -> Callable[..., Tensor]:
    met = torch.arange(columns_1NQQ.shape[-1], device=counts_1NQ.device) < counts_1NQ[..., None]
    keep_NQQ = torch.zeros_like(met).scatter(-1, columns_1NQQ.long(), met)[0]

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return keep_NQQ[head % keep_NQQ.shape[0], query // block_size, key // block_size]

    return mask_mod


__all__ = ["LayerBlocks", "SparseBlocks", "count_pairs", "full_block_mask", "sparse_blocks"]
