"""Where and with what something was measured: a result without it is hearsay."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import ROOT
from cogx_fast.measure import contest

HISTORY = ROOT / "out" / "benchmarks" / "history.jsonl"
"""Not committed: a file that every run changes would make every next run a dirty one. What matters goes to results/."""
_GPU_FACTS = (
    "name", "driver_version", "power.limit", "power.draw", "clocks.sm", "clocks.max.sm", "clocks.mem",
    "temperature.gpu", "clocks_event_reasons.active",
)  # fmt: skip


def snapshot(device: torch.device) -> dict[str, Any]:
    """Commit, whether the tree differs from it, versions, device, clocks, power limit, and how busy the machine is."""
    commit = _run("git", "rev-parse", "HEAD", cwd=ROOT)
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit,
        "dirty": None if commit is None else bool(_run("git", "status", "--porcelain", cwd=ROOT)),
        **contest.machine(device),
        "cuda": torch.version.cuda,
        "gpu": _gpu() if device.type == "cuda" else None,
        "cpus": os.cpu_count(),
        "load": [round(load, 2) for load in os.getloadavg()],
    }


def record(kind: str, results: Mapping[str, Any], device: torch.device, path: Path = HISTORY) -> dict[str, Any]:
    """Append results with their ``snapshot`` to the history, a JSON object a line.

    Returns:
        The entry.
    """
    entry = {"kind": kind, **snapshot(device), "results": results}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry, ensure_ascii=False) + "\n")
    return entry


def _gpu() -> dict[str, str] | None:
    """What the driver says of the GPU; settings are read and never changed."""
    answer = _run("nvidia-smi", f"--query-gpu={','.join(_GPU_FACTS)}", "--format=csv,noheader")
    if answer is None:
        return None
    return dict(zip(_GPU_FACTS, (value.strip() for value in answer.splitlines()[0].split(",")), strict=False))


def _run(*command: str, cwd: Path | None = None) -> str | None:
    """Its output, or None where there is no such command or it fails."""
    try:
        child = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return child.stdout.strip() if child.returncode == 0 else None
