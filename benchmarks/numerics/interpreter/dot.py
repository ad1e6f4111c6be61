"""``tl.dot``: operands as the tensor cores read them, sums in fp32 or int32.

The interpreter multiplies the bits of bf16 and fp8, and int8 by numpy's loop over integers. The order of summation is
numpy's, not the tensor cores'.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter as ti

from benchmarks.numerics.interpreter.rounding import Handle, widen

_EXACT_INPUTS = (1 << 24) // (128 * 128)
"""So many products of int8 have a sum below 2**24, which fp32 holds exactly in whatever order they are added."""


def _dot(self: Any, a: Handle, b: Handle, accumulator: Handle, precision: Any, _: Any) -> Handle:
    kind = accumulator.dtype.scalar
    left, right = widen(a.data, a.dtype.scalar), widen(b.data, b.dtype.scalar)
    if left.dtype.kind == "i":
        return Handle(_integer_product(left, right) + accumulator.data, kind)
    if a.dtype.scalar == tl.float32 and precision == ti._ir.INPUT_PRECISION.TF32:
        left, right = _tf32(left), _tf32(right)
    wide = np.float64 if accumulator.data.dtype == np.float64 else np.float32
    product = np.matmul(left.astype(wide), right.astype(wide)) + accumulator.data
    return Handle(product.astype(accumulator.data.dtype), kind)


def _integer_product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    if left.dtype.itemsize > 1 or left.shape[-1] > _EXACT_INPUTS:
        return np.matmul(left, right, dtype=np.int32)
    return np.matmul(left.astype(np.float32), right.astype(np.float32)).astype(np.int32)


def _tf32(data: np.ndarray) -> np.ndarray:
    """Ten bits of mantissa, the nearest."""
    return ((np.ascontiguousarray(data).view(np.uint32) + 0x1000) & 0xFFFFE000).view(np.float32)


def install() -> None:
    ti.InterpreterBuilder.create_dot = _dot


__all__ = ["install"]
