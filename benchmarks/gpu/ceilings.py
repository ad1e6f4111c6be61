"""What this device does at most: large products, a large copy, attention alone. On random data, never on zeros."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from benchmarks.gpu import models
from benchmarks.gpu.cases import FLEX_OPTIONS, Case
from cogx_fast.model.backends import BACKENDS
from cogx_fast.model.masks import full_block_mask

_REPEATS = 20


def measure(name: str, device: torch.device, *, quick: bool) -> dict[str, Any]:
    """The ceiling of that name: TFLOP/s of ``bf16``, ``fp8`` or ``int8`` products, GB/s of ``copy`` (read and written).

    Raises:
        UnsupportedError: this device has no such products.
    """
    if name == "copy":
        source = torch.randn((1 << 22) if quick else (1 << 30), device=device)
        target = torch.empty_like(source)
        seconds = _median_seconds(lambda: target.copy_(source), device)
        return {"ceiling": "bandwidth", "value": 2 * source.numel() * source.element_size() / seconds / 1e9}
    side = 256 if quick else 8192
    product = _product(name, side, device)
    return {"ceiling": name, "value": 2 * side**3 / _median_seconds(product, device) / 1e12}


def _product(name: str, side: int, device: torch.device) -> Callable[[], Tensor]:
    if name == "int8":
        a, b = (torch.randint(-128, 128, (side, side), dtype=torch.int8, device=device) for _ in range(2))
        return lambda: torch._int_mm(a, b.t())
    left, right = (torch.randn(side, side, device=device) for _ in range(2))
    if name == "bf16":
        x, y = left.bfloat16(), right.bfloat16()
        return lambda: x @ y.t()
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise models.UnsupportedError("fp8 products need compute capability 8.9")
    p, q = left.to(torch.float8_e4m3fn), right.to(torch.float8_e4m3fn)
    one = torch.ones((), device=device)
    return lambda: torch._scaled_mm(p, q.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


def attention(case: Case, device: torch.device) -> dict[str, Any]:
    """One attention kernel alone, with the model's heads and tokens: TFLOP/s, and its error where a reference fits.

    Raises:
        UnsupportedError: the kernel does not run here.
    """
    config, tokens = case.config, case.tokens.joint
    shape = (models.BATCH, tokens, config.num_attention_heads, config.attention_head_dim)
    q, k, v = (torch.randn(shape, device=device, dtype=models.DTYPE).transpose(1, 2) for _ in range(3))
    kernel = _attention_kernel(case, device)
    out = kernel(q, k, v)
    rows = min(tokens, 256)  # the first queries of one head, against all keys, in fp32
    with models.exact_fp32():
        plain = torch.softmax(q[0, 0, :rows].float() @ k[0, 0].float().T / config.attention_head_dim**0.5, -1)
        error = models.relative_error(out[0, 0, :rows], plain @ v[0, 0].float())
    if not error < 0.02:
        raise ValueError(f"{case.attention} is wrong: relative error {error:.2e} against fp32, not timed")
    seconds = _median_seconds(lambda: kernel(q, k, v), device)
    flops = 4 * models.BATCH * tokens**2 * config.inner_dim
    return {"tflops": flops / seconds / 1e12, "milliseconds": 1e3 * seconds, "error_fp32": error}


def _attention_kernel(case: Case, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A backend's own function, or flex-attention with some options of its template."""
    from torch.nn.attention.flex_attention import flex_attention

    family, _, variant = case.attention.partition(" ")
    backend = BACKENDS[family]
    reason = backend.why_not(device, models.DTYPE, case.config.attention_head_dim)
    if reason or (variant and device.type == "cpu"):
        raise models.UnsupportedError(f"{case.attention}: {reason or 'the kernel for CPUs has no such options'}")
    if backend.prepare is not None:
        backend.prepare()
    run: Any = backend.run
    if variant:
        options = FLEX_OPTIONS[variant]

        def run(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Any:
            return flex_attention(q, k, v, block_mask=mask, kernel_options=options)

    mask = full_block_mask(device) if backend.masks is BlockMask else None
    if backend.masks is BlockMask:  # eager, it would hold every score in memory
        run = torch.compile(run, fullgraph=True, backend="aot_eager" if case.quick else "inductor")
    return lambda q, k, v: run(q, k, v, mask)


def _median_seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Of one call; on CUDA between events on the device."""
    for _ in range(3):
        run()
    times = []
    for _ in range(_REPEATS):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            run()
            times.append(time.perf_counter() - begin)
    return statistics.median(times)
