"""Times, memory and kernels of a step."""

from __future__ import annotations

import dataclasses
import re
import resource
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.gpu import models
from benchmarks.gpu.cases import Case
from cogx_fast import bench, timing

SHARES = {"p20": 0.2, "p50": 0.5, "p80": 0.8}
_WARM_UP, _LEAST, _MOST, _SECONDS = 2, 5, 30, 12.0

KINDS: dict[str, str] = {
    "attention": r"flash|fmha|attention|sdpa|_attn|flex|triton_tem_fused.*(?:attn|flex|softmax)|sage",
    "products": r"gemm|cutlass|nvjet|cublas|xmma|_mm\b|mm_|\bmm|matmul|linear|conv",
    "generated": r"triton_(?:poi|per|red|fus)|^triton_",
    "copies": r"memcpy|memset|copy|\bcat\b|clone|contiguous",
}
"""Kinds of kernel by what their names hold, the first that fits; all else is "other"."""


def time_layers(case: Case, layers: int, device: torch.device) -> dict[str, Any]:
    """A model of so many layers: seconds of a step, of the first call, peak memory and time by kind of kernel."""
    config = dataclasses.replace(case.config, num_layers=layers)
    model = models.prepare(case, models.upstream(config, models.DTYPE, device))
    arguments = models.arguments(case, models.DTYPE, device)

    def step() -> torch.Tensor:
        return models.run(model, arguments)

    first = _seconds(step, device)
    each = min(_seconds(step, device) for _ in range(_WARM_UP))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    number = 5 if case.quick else max(_LEAST, min(_MOST, int(_SECONDS / each)))
    times = [_seconds(step, device) for _ in range(number)]
    found = {
        "layers": layers,
        "steps": number,
        "first_call": first,
        "seconds": {name: timing.percentile(times, share) for name, share in SHARES.items()},
        "peak_gib": _peak(device) / 1024**3,
        "kernels": kernel_kinds(step, device),
    }
    return found


def summary(case: Case, by_layers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A step of the whole model, from all its layers or extrapolated from fewer."""
    layers = case.config.num_layers
    work = bench.Work(config=case.config, tokens=case.tokens, batch=models.BATCH)
    seconds = {name: at_layers([(f["layers"], f["seconds"][name]) for f in by_layers], layers) for name in SHARES}
    seconds["p20"], seconds["p80"] = sorted((seconds["p20"], seconds["p80"]))  # noise may turn extrapolated ones round
    kinds = {kind for found in by_layers for kind in found["kernels"]}
    kernels = {
        kind: max(0.0, at_layers([(found["layers"], found["kernels"].get(kind, 0.0)) for found in by_layers], layers))
        for kind in sorted(kinds)
    }
    return {
        "seconds_step": seconds,
        "extrapolated": case.extrapolated,
        "tflops": bench.flops(work) / seconds["p50"] / 1e12,
        "peak_gib": at_layers([(found["layers"], found["peak_gib"]) for found in by_layers], layers),
        "first_call_warm": by_layers[0]["first_call"],
        "kernels": kernels,
        "by_layers": list(by_layers),
    }


def at_layers(measured: Sequence[tuple[int, float]], layers: int) -> float:
    """What was measured at all layers, or the line through two smaller numbers of them, at all."""
    known = dict(measured)
    if layers in known:
        return known[layers]
    (few, low), (more, high) = measured[0], measured[-1]
    return low + (layers - few) * (high - low) / (more - few)


def kernel_kinds(step: Any, device: torch.device) -> dict[str, float]:
    """Seconds of one step by kind of kernel (on the CPU by kind of operator), from torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        step()
        models.synchronize(device)
    found: dict[str, float] = {}
    for event in profiler.key_averages():
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        microseconds = event.self_device_time_total if cuda else event.self_cpu_time_total
        if microseconds and on_device == cuda:
            found[kind_of(event.key)] = found.get(kind_of(event.key), 0.0) + microseconds / 1e6
    return found


def kind_of(name: str) -> str:
    """The kind of a kernel of that name."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), "other")


def _seconds(step: Any, device: torch.device) -> float:
    models.synchronize(device)
    begin = time.perf_counter()
    step()
    models.synchronize(device)
    return time.perf_counter() - begin


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
