"""Times in turns, ceilings, memory and launches."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.cases import BATCH, STEPS, Case
from benchmarks.gpu.models import Step, UnsupportedError
from cogx_fast.measure import devices, roofline, timing
from cogx_fast.runtime.step_caching.step_schedule_file import foresee_schedule

OURS, PEER = "ours", "peer"
UNITS = {"bandwidth": "GB/s"}
"""Of the ceilings, the others are TFLOP/s."""
KINDS: dict[str, str] = {
    "generated": r"^triton_(?:poi|per|red|fus)",
    "attention": r"flash|fmha|attention|sdpa|_attn|flex|triton_tem_fused.*(?:attn|flex|softmax)|sage",
    "products": r"gemm|cutlass|nvjet|cublas|xmma|_mm\b|mm_|\bmm|matmul|linear|conv",
    "copies": r"memcpy|memset|copy|\bcat\b|clone|contiguous",
}
"""Kinds of kernel by what their names hold, the first that fits; all else is "other"."""
LONGEST = 12


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What one step does besides taking time."""

    peak_bytes: int
    """Held at once above what was held before."""
    launches: int | None
    """Kernels on CUDA, operators on the CPU; None where the profiler may not see them (CUPTI needs permission)."""
    kinds: dict[str, float]
    """Seconds by kind of kernel, by torch's profiler."""
    kernels: dict[str, float]
    """Seconds by name of the ``LONGEST`` kernels."""


def in_turns(
    steps: Mapping[str, Step], now: Callable[[], float], *, rounds: int | None, seconds: float
) -> dict[str, list[float]]:
    """Seconds of each step in each round, on a device whose clocks have settled.

    Args:
        steps: what is timed, by name.
        now: ``timing.clock`` of the device.
        rounds: how many; None: as many as take some ``seconds``, 5 to 50.
        seconds: to run before anything counts.
    """
    begin = time.perf_counter()
    warm = timing.take_turns(steps, rounds=2, now=now)
    while time.perf_counter() - begin < seconds:
        warm = timing.take_turns(steps, rounds=2, now=now)
    if rounds is None:
        rounds = max(5, min(50, int(seconds / max(1e-9, sum(min(times) for times in warm.values())))))
    return timing.take_turns(steps, rounds=rounds, now=now)


def ceilings(device: torch.device, *, quick: bool) -> dict[str, float]:
    """What the device does at most, on random data: TFLOP/s of ``bf16``, ``fp8`` and ``int8`` products that it has, and
    GB/s of a large copy (``bandwidth``, read and written): ``cogx-fast roofline --ceilings`` reads the same.
    """
    side = 256 if quick else 8192
    now, found = timing.clock(device), {}
    source = torch.randn((1 << 22) if quick else (1 << 30), device=device)
    target = torch.empty_like(source)
    work: dict[str, tuple[float, Step]] = {
        "bandwidth": (2 * source.numel() * source.element_size() / 1e9, lambda: target.copy_(source))
    }
    for name in ("bf16", "fp8", "int8"):
        try:
            work[name] = (2 * side**3 / 1e12, _product(name, side, device))
        except UnsupportedError:
            continue
    for name, (amount, step) in work.items():
        try:
            times = in_turns({name: step}, now, rounds=20, seconds=0.0 if quick else 1.0)[name]
        except RuntimeError:
            if device.type == "cpu" and name == "fp8":  # not every CPU has them; there the gate is only tried
                continue
            raise
        found[name] = amount / timing.median(times).median
    return found


def _product(name: str, side: int, device: torch.device) -> Step:
    if name == "int8":
        a, b = (torch.randint(-128, 128, (side, side), dtype=torch.int8, device=device) for _ in range(2))
        return lambda: torch._int_mm(a, b.t())
    left, right = (torch.randn(side, side, device=device) for _ in range(2))
    if name == "bf16":
        x, y = left.bfloat16(), right.bfloat16()
        return lambda: x @ y.t()
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise UnsupportedError("fp8 products need compute capability 8.9")
    p, q = left.to(torch.float8_e4m3fn), right.to(torch.float8_e4m3fn)
    one = torch.ones((), device=device)
    return lambda: torch._scaled_mm(p, q.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


def floor_seconds(case: Case, device: devices.Device) -> float:
    """The least time that the ceilings allow for what the case computes."""
    scheme = case.recipe if case.recipe in roofline.SCHEMES else roofline.UNQUANTIZED
    if case.part == "loop":
        schedule = foresee_schedule(case.recipe, case.config, STEPS)
        return sum(roofline.schedule_seconds(schedule, case.config, case.tokens, device, batch=BATCH))
    parts = roofline.parts(case.config, case.tokens, batch=BATCH, scheme=scheme, kept=case.kept)
    return sum(part.seconds(device) for part in parts if case.part != "attention" or part.name == "attention")


def describe(device: torch.device, measured: Mapping[str, float]) -> devices.Device:
    """This device with the ceilings measured on it; exponentials by its multiprocessors and clock."""
    known: dict[str, Any] = {}
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        known = {"name": facts.name, "multiprocessors": facts.multi_processor_count}
        if hertz := 1e3 * getattr(facts, "clock_rate", 0):
            known["boost_hz"] = hertz
    described = devices.find_device(known.get("name", ""))
    if described is None:
        described = dataclasses.replace(devices.DEVICES["h100"], name="cpu", fp8=None, **known)
    return roofline.with_ceilings(described, measured)


def traffic(step: Callable[[], Tensor], device: torch.device) -> Traffic:
    """One step's peak memory and launches."""
    from torch.profiler import ProfilerActivity, profile

    cuda = device.type == "cuda"
    peak = peak_bytes(step, device)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        step()
        if cuda:
            torch.cuda.synchronize(device)
    launches, kinds, kernels = 0, dict.fromkeys([*KINDS, "other"], 0.0), dict[str, float]()
    for event in profiler.key_averages():
        microseconds = event.self_device_time_total if cuda else event.self_cpu_time_total
        if (event.device_type == torch.autograd.DeviceType.CUDA) == cuda:
            launches += event.count
            kinds[kind_of(event.key)] += microseconds / 1e6
            kernels[event.key] = microseconds / 1e6
    longest = sorted(kernels, key=lambda name: -kernels[name])[:LONGEST]
    return Traffic(peak_bytes=peak, launches=launches or None, kinds=kinds,
                   kernels={name: kernels[name] for name in longest})  # fmt: skip


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most bytes held at once above what was held before, by torch's allocator; on the CPU by its profiler."""
    from torch.profiler import ProfilerActivity, profile

    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    held = most = 0
    events = (event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def kind_of(name: str) -> str:
    """The kind of a kernel of that name."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), "other")
