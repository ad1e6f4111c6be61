"""Attention over tokens that lie on several ranks: heads for tokens before it, and back (Ulysses, arXiv:2309.14509).

Every rank has L tokens of the joint stream with all N heads, and attends with M = N / R heads to all S tokens. Where S
is not R · L, what the last ranks have beyond it is cut off before attention: no mask is needed for it, and whatever
attention backend runs sees the very tokens that one process alone would.

Suffixes: B batch, S joint tokens, L tokens of a rank, N heads, M heads of a rank, K head width, R ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cogx_fast.attention.attend import Mask
from cogx_fast.attention.masks import LayerBlocks, SparseBlocks


class Exchange(NamedTuple):
    """Stands where a block is given a mask: has that, and how tokens and heads change places."""

    mask: Mask | LayerBlocks | SparseBlocks
    """Of all S tokens, for this rank's heads."""
    whole_S: Tensor | None
    """Where S is not R · L. Only its size is read: sizes of tensors are symbols in compiled code, numbers are not."""
    ranks: int
    group: str
    """The name under which torch knows the ranks' group."""

    def of_layer(self, layer: int) -> Exchange:
        """With that layer's mask."""
        return self._replace(mask=self.mask.of_layer(layer)) if isinstance(self.mask, SparseBlocks) else self

    def graph(self, x_BLD: Tensor) -> tuple[bool, bool]:
        """What a compiled graph holds fixed: whether tokens are cut off, and whether there is one video alone, of which
        the tokens of all ranks are a view of what they sent."""
        return self.whole_S is not None, x_BLD.shape[0] == 1

    def to_heads(self, q_BLNK: Tensor, k_BLNK: Tensor, v_BLNK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of this rank's tokens for those of its heads, ``(B, S, M, K)``, in one message."""
        apart = [each.unflatten(2, (self.ranks, -1)).permute(2, 0, 1, 3, 4) for each in (q_BLNK, k_BLNK, v_BLNK)]
        received = self._all_to_all(torch.stack(apart, dim=3))  # R B L 3 M K
        q, k, v = (each.transpose(0, 1).flatten(1, 2) for each in received.unbind(3))
        if self.whole_S is None:
            return q, k, v
        tokens = self.whole_S.shape[0]
        return q[:, :tokens], k[:, :tokens], v[:, :tokens]

    def to_tokens(self, out_BSMK: Tensor, rows: int) -> Tensor:
        """What attention gave for this rank's heads, for all heads of its tokens: ``(B, L, N, K)``, L = ``rows``."""
        if self.whole_S is not None:
            padded = out_BSMK.new_zeros(out_BSMK.shape[0], self.ranks * rows, *out_BSMK.shape[2:])
            out_BSMK = torch.slice_scatter(padded, out_BSMK, 1, 0, self.whole_S.shape[0])
        received = self._all_to_all(out_BSMK.unflatten(1, (self.ranks, rows)).transpose(0, 1).contiguous())
        return received.permute(1, 2, 0, 3, 4).flatten(2, 3)

    def _all_to_all(self, sent: Tensor) -> Tensor:
        """Part r of dimension 0 to rank r, and what the ranks sent in their order."""
        ops, once = torch.ops._c10d_functional, [1] * self.ranks
        received: Tensor = ops.wait_tensor(ops.all_to_all_single(sent, once, once, self.group))
        return received


__all__ = ["Exchange"]
