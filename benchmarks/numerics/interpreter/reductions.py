"""``tl.reduce`` by a kernel's own function (Welford, a maximum that keeps NaN): by halves, whole arrays at a time.

The interpreter calls the function once for each element. A GPU reduces by halves, too, in an order of its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter as ti

from benchmarks.numerics.interpreter.rounding import Handle


def _reduce_by_halves(self: Any, inputs: tuple[Any, ...]) -> list[Any]:
    inputs, axis = self.unravel(inputs, self.axis)
    kinds = [part.dtype for part in inputs]
    parts = [np.moveaxis(part.handle.data, axis, -1) for part in inputs]
    while (length := parts[0].shape[-1]) > 1:
        half, odd = divmod(length, 2)
        assert not odd, "the sizes of Triton's blocks are powers of two"
        halves = ([part[..., :half] for part in parts], [part[..., half:] for part in parts])
        found = self.combine_fn.fn(*_tensors(halves[0], kinds), *_tensors(halves[1], kinds))
        found = found if isinstance(found, tuple) else (found,)
        parts = [np.broadcast_to(part.handle.data, halves[0][0].shape) for part in found]
    out = []
    for part, kind in zip(parts, kinds, strict=True):
        data = np.moveaxis(part, -1, axis) if self.keep_dims else part[..., 0]
        out.append(self.to_tensor(data if data.ndim else data.item(), kind))
    return out


def _tensors(data: list[np.ndarray], kinds: list[Any]) -> list[Any]:
    return [
        tl.core.tensor(Handle(part, kind.scalar), tl.block_type(kind.scalar, list(part.shape)))
        for part, kind in zip(data, kinds, strict=True)
    ]


def install() -> None:
    ti.ReduceOps.generic_reduce = _reduce_by_halves


__all__ = ["install"]
