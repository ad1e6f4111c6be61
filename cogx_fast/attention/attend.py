"""Attention: one function over the named backends, and what prepares queries and keys for it.

Suffixes: B batch, S joint tokens, N heads, K head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from cogx_fast.attention.backends import get_backend
from cogx_fast.model.tracing import is_traced

Mask = Tensor | BlockMask | None
Rotary = tuple[Tensor, Tensor]


def attend(q_BSNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor, *, backend: str, mask: Mask = None) -> Tensor:
    """softmax(q · kᵀ / √K) · v over every token (non-causal), by the named backend.

    Inputs are read and the output is left in (B, S, N, K) order, the linears' own, so that no copy stands before or
    after.

    Args:
        q_BSNK, k_BSNK, v_BSNK: queries, keys, values of one dtype; any strides with channels adjacent.
        backend: a name from ``backends.BACKENDS``.
        mask: of the kind that the backend takes: a tensor that broadcasts to (B, N, S, S), boolean (True: attend) or
            added to the scores, or a ``BlockMask``.

    Returns:
        ``out_BSNK``.

    Raises:
        ValueError: unknown backend, or a mask of a kind it does not take.
    """
    chosen = get_backend(backend)
    if mask is not None and (chosen.masks is None or not isinstance(mask, chosen.masks)):
        wanted = chosen.masks.__name__ if chosen.masks else "no mask"
        raise ValueError(f"attention backend {backend!r} takes {wanted}, got a {type(mask).__name__}: choose another")
    return chosen.run(q_BSNK.transpose(1, 2), k_BSNK.transpose(1, 2), v_BSNK.transpose(1, 2), mask).transpose(1, 2)


class RotaryNorm(nn.LayerNorm):
    """Queries or keys: LayerNorm over K, then each pair of neighbouring channels turned by an angle (arXiv:2104.09864).

    Written out over the row and the row with each pair exchanged, which have the same mean and variance: so each output
    channel is a function of one row, and norm and rotation compile to one kernel, for queries and keys together
    (``layer_norm`` and a rotation after it compile to two). Not compiled, every operation is a pass over memory, and
    ``layer_norm`` and a rotation take less time. Computed in fp32, rounded once, both; but for a derivative that is not
    compiled rounded after the norm as well, as upstream does: autograd keeps what a norm is given, and no fp32 copy.
    """

    def forward(self, x_BSNK: Tensor, rotary: Rotary | None) -> Tensor:  # type: ignore[override]  # it takes angles too
        """As ``x_BSNK`` (any strides); ``rotary`` is from ``tables.join_rotary``, None for no rotation."""
        if rotary is None:
            return super().forward(x_BSNK)
        cos_S1K, sin_S1K = (table.unsqueeze(1) for table in rotary)
        weight_K, bias_K = self.weight.float(), self.bias.float()
        if not is_traced():
            if x_BSNK.requires_grad and torch.is_grad_enabled():
                normed = super().forward(x_BSNK).float()
            else:
                normed = F.layer_norm(x_BSNK.float(), self.normalized_shape, weight_K, bias_K, self.eps)
            return _turn_pairs(normed, cos_S1K, sin_S1K).to(x_BSNK.dtype)
        variance, mean = torch.var_mean(x_BSNK.float(), -1, correction=0, keepdim=True)
        inverse_std = torch.rsqrt(variance + self.eps)
        normed = (x_BSNK.float() - mean) * inverse_std * weight_K + bias_K
        swapped = (_swap_pairs(x_BSNK).float() - mean) * inverse_std * _swap_pairs(weight_K) + _swap_pairs(bias_K)
        return (normed * cos_S1K + swapped * sin_S1K).to(x_BSNK.dtype)


def _turn_pairs(x_BSNK: Tensor, cos_S1K: Tensor, sin_S1K: Tensor) -> Tensor:
    """Turn the pairs of ``x_BSNK`` in its own memory: in fp32 it is the widest tensor before the feed-forward.

    Autograd needs no value that is written over, of a norm's result or here.
    """
    swapped = x_BSNK.unflatten(-1, (-1, 2)).roll(1, -1).flatten(-2)  # on the CPU in half the time of a flip
    return x_BSNK.mul_(cos_S1K).addcmul_(swapped, sin_S1K)


def _swap_pairs(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


__all__ = ["Mask", "Rotary", "RotaryNorm", "attend"]
