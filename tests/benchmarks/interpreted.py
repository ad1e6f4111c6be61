"""Kernels whose results are known, run by the corrected interpreter; in a process of its own, which prints what it saw.

TRITON_INTERPRET=1 python -m tests.benchmarks.interpreted
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch._inductor.runtime import triton_helpers

from benchmarks.numerics import interpreter
from benchmarks.numerics.interpreter import MemoryFault, rounding

interpreter.install()
libdevice = triton_helpers.libdevice


@triton.jit
def copy(a, out, size, step, BLOCK: tl.constexpr):
    i = tl.program_id(0) * step + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(a + i, i < size) + 1, i < size)


@triton.jit
def neighbour(a, out, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(a + i + 1))


@triton.jit
def multiply(a, b, out, N: tl.constexpr, KIND: tl.constexpr):
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    product = tl.dot(tl.load(a + N * i + j), tl.load(b + N * i + j), out_dtype=KIND, input_precision="ieee")
    tl.store(out + N * i + j, product)


@triton.jit
def largest(a, out, N: tl.constexpr):
    tl.store(out + tl.arange(0, N), triton_helpers.max2(tl.load(a + N * tl.arange(0, N)[:, None] + tl.arange(0, N)), 1))


@triton.jit
def scale(a, b, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(a + i) * tl.load(b + i))


@triton.jit
def inverse_root(a, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, libdevice.rsqrt(tl.load(a + i)))


def rounds_as_torch() -> dict[str, bool]:
    """Every bit pattern's neighbourhood is hit: random ones, halves between two values, subnormals, infinities."""
    generator = np.random.default_rng(0)
    bits = generator.integers(0, 2**32, 200_000, dtype=np.uint32)
    bits = np.concatenate([bits, bits & 0xFFFF0000 | 0x8000, bits & 0xFFF00000 | 0x80000])  # halves of bf16 and fp8
    values = torch.from_numpy(bits.view(np.float32))
    values = torch.cat([values[~values.isnan()], torch.randn(50_000), torch.tensor([0.0, -0.0, 1e-9, 448.0])])
    small = values[values.abs() <= 448]
    return {
        "bf16": _same(rounding.narrow(values.numpy(), tl.bfloat16), values.bfloat16().view(torch.uint16)),
        "e4m3": _same(rounding.narrow(small.numpy(), tl.float8e4nv), small.to(torch.float8_e4m3fn).view(torch.uint8)),
        "saturates": rounding.widen(rounding.narrow(np.float32([1e9, -500]), tl.float8e4nv), tl.float8e4nv).tolist()
        == [448.0, -448.0],
    }  # fmt: skip


def _same(bits: np.ndarray, expected: torch.Tensor) -> bool:
    return bool((bits == expected.numpy()).all())


def said(kernel: Any, grid: int, *, races: bool = False, **arguments: Any) -> str:
    """What a run of the kernel says; empty: nothing."""
    try:
        interpreter.run(kernel, (grid,), arguments, races=races)
    except MemoryFault as error:
        return str(error)
    return ""


def computes() -> dict[str, float]:
    """Largest differences from torch."""
    torch.manual_seed(0)
    found = {}
    for name, dtype, kind, out in (
        ("bf16 dot", torch.bfloat16, tl.float32, torch.float32),
        ("int8 dot", torch.int8, tl.int32, torch.int32),
        ("fp32 dot", torch.float32, tl.float32, torch.float32),
    ):
        a, b = (torch.randint(-128, 128, (64, 64)).to(dtype) for _ in range(2))
        if dtype.is_floating_point:
            a, b = (torch.randn(64, 64).to(dtype) for _ in range(2))
        result = torch.empty(64, 64, dtype=out)
        interpreter.run(multiply, (1,), {"a": a, "b": b, "out": result, "N": 64, "KIND": kind})
        found[name] = float((result.double() - a.double() @ b.double()).abs().max())
    a, row, scaled, roots = torch.randn(64, 64), torch.empty(64), torch.empty(64, dtype=torch.bfloat16), torch.empty(64)
    a[3, 5] = float("nan")
    interpreter.run(largest, (1,), {"a": a, "out": row, "N": 64})
    expected = a.amax(1)
    found["maximum"] = float((row - expected).nan_to_num().abs().max()) + float(row.isnan().sum() != 1)
    x, y = torch.randn(64).bfloat16(), torch.randn(64).bfloat16()
    interpreter.run(scale, (1,), {"a": x, "b": y, "out": scaled, "N": 64})
    found["bf16 product"] = float((scaled.float() - (x.float() * y.float()).bfloat16().float()).abs().max())
    positive = torch.rand(64) + 0.1
    interpreter.run(inverse_root, (1,), {"a": positive, "out": roots, "N": 64})
    found["libdevice"] = float((roots - positive.rsqrt()).abs().max())
    return found


def memory() -> dict[str, str]:
    a, out = torch.zeros(32), torch.zeros(32)
    return {
        "sound": said(copy, 4, races=True, a=a, out=out, size=32, step=8, BLOCK=8),
        "in place": said(copy, 4, races=True, a=a, out=a, size=32, step=8, BLOCK=8),
        "past the end": said(copy, 4, a=a, out=out, size=33, step=9, BLOCK=8),
        "written twice": said(copy, 4, races=True, a=a, out=out, size=32, step=7, BLOCK=8),
        "read and written": said(neighbour, 3, races=True, a=a, out=a, BLOCK=8),
    }


if __name__ == "__main__":
    print(json.dumps({"rounds": rounds_as_torch(), "computes": computes(), "memory": memory()}))
