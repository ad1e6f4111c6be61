"""bf16 and fp8, which numpy lacks: how values are rounded to them, and arithmetic on them.

The interpreter keeps them as bits. It cuts fp32 off at bf16 and rounds halves up to fp8, losing the carry into the
exponent; a GPU rounds both to nearest even, and saturates to fp8 (e4m3). Its arithmetic works on the bits as if they
were integers; here it is done in fp32 and rounded.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter as ti

Handle = ti.TensorHandle

_FP8 = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}
_FP8_VALUES = {kind: torch.arange(256, dtype=torch.uint8).view(dtype).float().numpy() for kind, dtype in _FP8.items()}
_STORED_AS_BITS = (tl.bfloat16, *_FP8)
_LARGEST_E4M3 = 448.0


def widen(data: np.ndarray, kind: Any) -> np.ndarray:
    """Bits of bf16 or fp8 to the fp32 that they stand for; other data as they are."""
    if kind == tl.bfloat16:
        return (data.astype(np.uint32) << 16).view(np.float32)
    if kind in _FP8_VALUES:
        return _FP8_VALUES[kind][data]
    return data


def narrow(data: np.ndarray, kind: Any) -> np.ndarray:
    """To the bits of bf16 or fp8, rounded to nearest even; e4m3 saturates, as Triton's conversion does."""
    data = np.ascontiguousarray(data, dtype=np.float32)
    if kind == tl.bfloat16:
        bits = data.view(np.uint32)
        rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
        return np.where(np.isnan(data), 0x7FFF, rounded).astype(np.uint16)
    if kind == tl.float8e4nv:
        data = np.clip(data, -_LARGEST_E4M3, _LARGEST_E4M3)  # leaves NaN
    return torch.from_numpy(data).to(_FP8[kind]).view(torch.uint8).numpy()


def _cast(self: Any, source: Handle, type_: Any, *_: Any) -> Handle:
    was, kind = source.dtype.scalar, type_.scalar
    data = widen(source.data, was)
    if kind in _STORED_AS_BITS:
        return Handle(source.data if was == kind else narrow(data, kind), kind)
    return Handle(data.astype(ti._get_np_dtype(kind)), kind)


_ARITHMETIC = (np.add, np.subtract, np.multiply, np.divide, np.fmod, np.minimum, np.maximum)
_COMPARISONS = (np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal)
_binary_op = ti.InterpreterBuilder.binary_op


def _binary(self: Any, left: Handle, right: Handle, op: Any) -> Handle:
    kind = left.dtype.scalar
    if kind in _STORED_AS_BITS and op in (*_ARITHMETIC, *_COMPARISONS):
        out = op(widen(left.data, kind), widen(right.data, kind))
        return Handle(out if out.dtype == bool else narrow(out, kind), kind)
    return _binary_op(self, left, right, op)


def _refuse_bits(operation: Any) -> Any:
    """The operation, for kinds that numpy has: on bits it would compute nonsense without a word."""

    def call(self: Any, *operands: Any) -> Handle:
        for operand in operands:
            if isinstance(operand, Handle) and operand.dtype.scalar in _STORED_AS_BITS:
                raise NotImplementedError(f"the interpreter computes this on the bits of {operand.dtype}: add it here")
        return operation(self, *operands)

    return call


_dtype_of = ti._get_np_dtype
_dtypes: dict[str, np.dtype] = {}


def _remembered_dtype(type_: Any) -> np.dtype:
    """As the interpreter's own, which makes a table at each call."""
    kind = type_.scalar
    if isinstance(kind, tl.pointer_type):
        return np.dtype(np.uint64)
    if kind.name not in _dtypes:
        _dtypes[kind.name] = _dtype_of(kind)
    return _dtypes[kind.name]


def install() -> None:
    builder: Any = ti.InterpreterBuilder
    ti._get_np_dtype = _remembered_dtype
    builder.cast_impl = builder.create_fp_to_fp = _cast
    builder.binary_op = _binary
    builder.create_fma = _refuse_bits(builder.create_fma)
    builder.create_clampf = _refuse_bits(builder.create_clampf)
    builder.unary_op = _refuse_bits(builder.unary_op)


__all__ = ["Handle", "install", "narrow", "widen"]
