"""Reports by a plain call: each in a process of its own, because what it takes to make one is global."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks.codegen import shim
from benchmarks.codegen.cases import Case
from benchmarks.codegen.report import CodegenError, Report
from cogx_fast.measure.devices import get_device

SECONDS_A_CASE = 300


def unavailable() -> str | None:
    """Why no report can be made on this machine and what to install, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton (the version in constraints.txt)"
    import torch

    if torch.version.cuda is None and shim.compiler() is None:
        return "this build of torch is for CPUs and needs a C++ compiler once: install g++ or clang++"
    return None


def report(case: Case, device: str = "h100", *, real: bool = False) -> Report:
    """What a device would run for a case.

    Args:
        case: what to compile.
        device: short name of a described device (``devices.DEVICES``).
        real: compile for this machine's GPU, which must be that device.

    Raises:
        CodegenError: it cannot be made, or would not be true.
    """
    return reports([case], device, real=real)[0]


def reports(cases: Sequence[Case], device: str = "h100", *, real: bool = False) -> list[Report]:
    """As ``report``, for several cases in one process."""
    answers = ask(cases, device, real=real)
    for case, answer in zip(cases, answers, strict=True):
        if isinstance(answer, str):
            raise CodegenError(f"{case.name} on {device}: {answer}")
    return [answer for answer in answers if isinstance(answer, Report)]


def ask(cases: Sequence[Case], device: str = "h100", *, real: bool = False) -> list[Report | str]:
    """As ``reports``, with the error's words in the place of a report that could not be made."""
    get_device(device)
    if reason := unavailable():
        raise CodegenError(reason)
    request = {"device": device, "real": real, "cases": [dataclasses.asdict(case) for case in cases]}
    answers = run_worker(
        "benchmarks.codegen.worker", request, environment(real), seconds=60 + SECONDS_A_CASE * len(cases)
    )
    return [Report.from_dict(a["report"]) if "report" in a else a["error"] for a in answers]


def run_worker(module: str, request: Any, environment: dict[str, str], *, seconds: float) -> Any:
    """Give a request to a process of its own, as JSON on its standard input, and read its answer from a file.

    Raises:
        CodegenError: it failed; with the end of what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "answer.json"
        child = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", module, str(out)],
            cwd=ROOT,
            env=environment,
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=seconds,
        )
        if child.returncode or not out.is_file():
            raise CodegenError(f"the compiling process exited {child.returncode}:\n{child.stderr[-4000:]}")
        return json.loads(out.read_text())


def environment(real: bool) -> dict[str, str]:
    """The child's: triton's own assembler, no GPU unless it is asked for, no settings of the caller's compiler."""
    from benchmarks.codegen.resources import tool

    unwanted = ("TORCHINDUCTOR_", "TORCH_COMPILE", "TORCHDYNAMO_", "TRITON_", "TORCH_LOGS")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    if not real:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_PTXAS_PATH": str(tool("ptxas"))}
    return environment
