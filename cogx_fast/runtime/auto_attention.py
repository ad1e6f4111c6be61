"""The exact attention backend that is fastest here: measured once at the model's real shape, remembered on disk."""

from __future__ import annotations

import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from cogx_fast.attention.attend import attend
from cogx_fast.attention.backends import BACKENDS, ready_backend
from cogx_fast.attention.masks import full_block_mask
from cogx_fast.runtime.compiling.candidates import drop_garbage
from cogx_fast.whole_file import write_whole

_ROUNDS = 5
_NO_MEMORY = "out of memory at that moment"
CANDIDATES = {
    "cuda": ("flex", "flex-flash", "sdpa-cudnn", "sdpa-flash", "fa3", "fa4"),
}
"""What is timed, by the kind of device."""
_ELSEWHERE = ("sdpa",)
"""On the CPU FlexAttention's generated kernel takes 1.2 to 2.7 times as long as SDPA's (benchmarks/NOTES.md)."""

Shape = tuple[int, int, int, int]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The backend that was chosen, and why."""

    name: str
    reason: str
    milliseconds: Mapping[str, float]
    """Of each candidate that ran, a median; empty where there was one candidate."""


@dataclass(frozen=True, kw_only=True)
class AttentionFor:
    """What a backend is chosen for: ``choose_attention``'s arguments, but the dtype, which is the model's."""

    shape: Shape
    device: torch.device
    compiled: bool


def choose_attention(shape: Shape, dtype: torch.dtype, device: torch.device, *, compiled: bool) -> Choice:
    """The fastest exact backend for such inputs.

    Args:
        shape: of the queries, ``(B, S, N, K)``.
        dtype: of the queries.
        device: where the model is.
        compiled: whether the model is compiled; if not, FlexAttention is no candidate, since it then holds every score
            in memory.
    """
    able = {
        name: BACKENDS[name]
        for name in CANDIDATES.get(device.type, _ELSEWHERE)
        if (compiled or BACKENDS[name].masks is not BlockMask)
        and BACKENDS[name].why_not(device, dtype, shape[-1]) is None
    }
    if device.type == "cuda" and set(able) == {"flex"}:  # it may not be the fastest, nor run (Turing)
        able["sdpa"] = BACKENDS["sdpa"]
    if not able:
        return Choice(name="sdpa", reason=f"no faster kernel takes {_short(dtype)} on {device.type}", milliseconds={})
    if len(able) == 1:
        name = next(iter(able))
        return Choice(name=name, reason=f"the one candidate on {device.type}", milliseconds={})
    memory = Memory(cache_folder() / "attention.json")
    key = _key(shape, dtype, device, compiled, able)
    remembered = memory.get(key)
    measured = remembered or {}
    for name in able if remembered is None else ():
        measured[name] = measure(name, shape, dtype, device, compiled)
        drop_garbage(device)  # which the next would have no memory for
    times = {name: ms for name, ms in measured.items() if isinstance(ms, float)}
    if remembered is None and times and _NO_MEMORY not in measured.values():  # another time there may be enough
        memory.put(key, measured)
    if not times:
        failures = "; ".join(f"{name}: {why}" for name, why in measured.items())
        return Choice(name="sdpa", reason=f"no candidate ran ({failures})", milliseconds={})
    name = min(times, key=times.__getitem__)
    listed = ", ".join(f"{other} {ms:.3g} ms" for other, ms in sorted(times.items(), key=lambda item: item[1]))
    failed = "".join(f", {other} failed ({why})" for other, why in measured.items() if other not in times)
    source = "remembered" if remembered else "measured"
    return Choice(
        name=name,
        reason=f"{source} at (B, S, N, K) = {shape} in {_short(dtype)}: {listed}{failed}",
        milliseconds=times,
    )


def measure(name: str, shape: Shape, dtype: torch.dtype, device: torch.device, compiled: bool) -> float | str:
    """Median milliseconds of one attention, or why it failed."""
    from cogx_fast.runtime.compiling.kinds import own

    before = torch.nn.attention.current_flash_attention_impl()
    try:
        backend = ready_backend(name, device=device, dtype=dtype, head_dim=shape[-1])
        product = torch.randn(shape[0], shape[1], 3, *shape[2:], dtype=dtype, device=device)
        q, k, v = product.unbind(2)  # strided as the model's are
        mask = full_block_mask(device) if backend.masks is BlockMask else None

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(q, k, v, backend=name, mask=mask)

        # with code of its own, else many measurements in one process would count as recompilations of one function
        timed = torch.compile(own(run, "attention"), fullgraph=True, dynamic=False) if compiled else run
        with torch.no_grad():
            return _median_ms(lambda: timed(q, k, v), device)
    except (RuntimeError, ValueError, ImportError) as error:  # RuntimeError: torch's, Inductor's, out of memory
        return _NO_MEMORY if "out of memory" in str(error) else str(error).split("\n")[0][:200]
    finally:
        if torch.nn.attention.current_flash_attention_impl() != before:
            torch.nn.attention.restore_flash_attention_impl()


def _median_ms(run: Callable[[], Any], device: torch.device) -> float:
    times = []
    for round_ in range(2 + _ROUNDS):
        _synchronize(device)
        start = time.perf_counter()
        run()
        _synchronize(device)
        if round_ >= 2:
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _key(shape: Shape, dtype: torch.dtype, device: torch.device, compiled: bool, able: Mapping[str, Any]) -> str:
    """All that an answer depends on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    versions = (torch.__version__, torch.version.cuda, torch.backends.cudnn.version())
    return json.dumps([name, *versions, list(shape), _short(dtype), compiled, sorted(able)])


class Memory:
    """Answers kept between processes, in one JSON file; without it everything works, and is measured again."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def get(self, key: str) -> dict[str, float | str] | None:
        """What was measured, or None; a damaged file counts as none."""
        answer = self._read().get(key)
        if not isinstance(answer, dict) or not all(isinstance(ms, float | str) for ms in answer.values()):
            return None
        is_passing = any("out of memory" in str(ms) for ms in answer.values())  # which earlier versions kept
        return None if is_passing else answer

    def put(self, key: str, measured: Mapping[str, float | str]) -> None:
        """Keep it, beside what other processes kept; warns where nothing can be written."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, json.dumps({**self._read(), key: dict(measured)}, indent=1))
        except OSError as error:
            warnings.warn(f"the chosen attention backend cannot be remembered in {self.path}: {error}", stacklevel=4)

    def _read(self) -> dict[str, Any]:
        try:
            held = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return held if isinstance(held, dict) else {}


def cache_folder() -> Path:
    """Where measurements are kept between runs: ``cogx-fast`` in $XDG_CACHE_HOME or ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cogx-fast"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


__all__ = ["AttentionFor", "Choice", "Memory", "Shape", "cache_folder", "choose_attention"]
