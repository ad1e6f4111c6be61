"""Attention: one function, named backends, and the fused query/key preparation before it.

Suffixes: B batch, S joint tokens, N heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

Mask = Tensor | BlockMask | None


def _sdpa(q_BNSK: Tensor, k_BNSK: Tensor, v_BNSK: Tensor, mask: Any) -> Tensor:
    return F.scaled_dot_product_attention(q_BNSK, k_BNSK, v_BNSK, attn_mask=mask)


def _flex(q_BNSK: Tensor, k_BNSK: Tensor, v_BNSK: Tensor, mask: Any) -> Tensor:
    out = flex_attention(q_BNSK, k_BNSK, v_BNSK, block_mask=mask)
    assert isinstance(out, Tensor)
    return out


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One way to compute attention, and what it can do."""

    name: str
    run: Callable[[Tensor, Tensor, Tensor, Any], Tensor]
    """(q_BNSK, k_BNSK, v_BNSK, mask) -> out_BNSK"""
    exact: bool
    """Equal to softmax attention up to rounding."""
    masks: type | None
    """The kind of mask it takes besides None."""


BACKENDS: dict[str, Backend] = {
    "sdpa": Backend(name="sdpa", run=_sdpa, exact=True, masks=Tensor),
    "flex": Backend(name="flex", run=_flex, exact=True, masks=BlockMask),
}
"""Every backend by its exact name."""


def get_backend(name: str) -> Backend:
    """The backend of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in BACKENDS:
        raise ValueError(f"attention backend {name!r} is not known: choose one of {', '.join(BACKENDS)}")
    return BACKENDS[name]


def attend(q_BSNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor, *, backend: str, mask: Mask = None) -> Tensor:
    """softmax(q · kᵀ / √K) · v over every token (non-causal), by the named backend.

    Inputs are read and the output is left in (B, S, N, K) order, the linears' own, so that no copy stands before or
    after.

    Args:
        q_BSNK, k_BSNK, v_BSNK: queries, keys, values of one dtype; any strides with channels adjacent.
        backend: a name from ``BACKENDS``.
        mask: for ``sdpa`` a tensor that broadcasts to (B, N, S, S), boolean (True: attend) or added to the scores; for
            ``flex`` a ``BlockMask``.

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


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of neighbouring channels of ``x`` by its angle (rotary positions, arXiv:2104.09864), in fp32.

    Args:
        x: (..., K).
        cos, sin: tables that broadcast to ``x``, the sine negated at even channels (``tables.join_rotary``).

    Returns:
        As ``x``. Out of place, and each output channel is a function of two inputs of its row, which lets the compiler
        keep norm and rotation in one kernel.
    """
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return (x.float() * cos + swapped.float() * sin).to(x.dtype)


__all__ = ["BACKENDS", "Backend", "Mask", "attend", "get_backend", "rotate"]
