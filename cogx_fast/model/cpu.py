"""What this machine's CPU can multiply: in which dtypes its products are fast, and exact.

The CPU's instructions decide, as far as the library that computes the products (oneDNN) uses them: what
``ONEDNN_MAX_CPU_ISA`` keeps from it counts as not there. So it is asked, or its products are tried; no name of a
processor is looked up.
"""

from __future__ import annotations

import functools
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

HALF = {torch.bfloat16: "bf16", torch.float16: "fp16"}
_SLOW = 20
"""A product that takes this many times an fp32 one is computed by plain loops: hundreds, where it was tried. Where the
factors are converted first it takes 4."""


class SlowDtypeWarning(UserWarning):
    """A model is to compute in a dtype that the CPU has no instructions for."""


def computes(dtype: torch.dtype) -> bool:
    """Whether the CPU has products in that dtype: False for bf16 and fp16 where torch computes them by plain loops.

    On x86 oneDNN answers (bf16 needs AVX512, fp16 AVX512-FP16; or either the AVX2 instructions that convert them).
    Elsewhere, and in a torch without oneDNN, a product is timed beside an fp32 one, once.
    """
    if dtype not in HALF:
        return True
    asked = _ask_onednn(dtype)
    return _try_product(dtype) if asked is None else asked


def slow_dtype(dtype: torch.dtype | None, device: torch.device) -> str | None:
    """What to tell who computes in that dtype on that device, without what to do about it; None where it is fast."""
    if dtype is None or device.type != "cpu" or computes(dtype):
        return None
    return f"this CPU has no {HALF[dtype]} instructions: torch computes {HALF[dtype]} by plain loops, many times slower"


def has_int8_products() -> bool:
    """Whether products of int8 matrices (``torch._int_mm``) are faster than fp32's here, and exact.

    Both take AVX512-VNNI. Without it torch has a plain loop, and oneDNN adds pairs of products in 16 bits, which
    saturate: 127 · 127 · 2 is 32258, and with the 128 by which it shifts one side the sum reaches 64770.
    """
    return _try_int8()


# torch.compiler.assume_constant_result does this, and imports the compiler, which takes seconds.
has_int8_products._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _ask_onednn(dtype: torch.dtype) -> bool | None:
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():
        return None
    ask = getattr(torch.ops.mkldnn, f"_is_mkldnn_{HALF[dtype]}_supported")
    return bool(ask())


@functools.cache
def _try_product(dtype: torch.dtype) -> bool:
    """Whether a product in that dtype is timed well below what plain loops would take."""

    def is_fast() -> bool:
        fastest = dict.fromkeys((torch.float32, dtype), float("inf"))
        for _ in range(6):
            for each in fastest:
                matrix = torch.ones(256, 256, dtype=each)
                begin = time.perf_counter()
                matrix @ matrix
                fastest[each] = min(fastest[each], time.perf_counter() - begin)
        return fastest[dtype] < _SLOW * fastest[torch.float32]

    return _aside(is_fast)


@functools.cache
def _try_int8() -> bool:
    """Whether torch gives int8 products to oneDNN, and that has sums of 32 bits for them."""

    def is_exact() -> bool:
        if not torch.cpu.get_capabilities().get("avx512_vnni", False) or _ask_onednn(torch.bfloat16) is not True:
            return False  # torch has loops, or oneDNN may not use what there is
        largest = torch.full((16, 64), 127, dtype=torch.int8)
        return bool((torch._int_mm(largest, largest.t()) == 64 * 127 * 127).all())

    return _aside(is_exact)


def _aside(ask: Callable[[], bool]) -> bool:
    """The answer from a thread of its own: torch's modes (tracing, fake tensors, inference) are a thread's."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(ask).result()


__all__ = ["HALF", "SlowDtypeWarning", "computes", "has_int8_products", "slow_dtype"]
