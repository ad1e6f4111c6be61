"""Results by a plain call: each in a process of its own, because what it takes to make one is global."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

from benchmarks.codegen.report import CodegenError
from benchmarks.codegen.run import environment, run_worker, unavailable
from benchmarks.numerics.report import Result

SECONDS = 3600
"""For everything, on a busy machine."""


def results(cases: Sequence[str], device: str = "h100") -> list[Result]:
    """Run cases, by name.

    Raises:
        CodegenError: one could not be run; the message says which and why.
    """
    found = []
    for name, answer in zip(cases, _ask({"device": device, "cases": list(cases)}), strict=True):
        if "error" in answer:
            raise CodegenError(f"{name} on {device}: {answer['error']}\n{answer['details']}")
        found += [Result(**result) for result in answer["results"]]
    return found


def findings(faults: Sequence[str], device: str = "h100") -> dict[str, str]:
    """Plant faults, by name.

    Returns:
        Why the code is wrong, for each; empty where nothing was found.

    Raises:
        CodegenError: some could not be planted, since the code is another by now.
    """
    found = _ask({"device": device, "faults": list(faults)})
    stale = [f"{each['fault']} ({each['case']}): {each['stale']}" for each in found if each["stale"]]
    if stale:
        raise CodegenError(f"faults that could not be planted, to be written anew in faults.py: {'; '.join(stale)}")
    return {each["fault"]: each["words"] for each in found}


def _ask(request: dict[str, Any]) -> Any:
    if reason := unavailable():
        raise CodegenError(reason)
    with tempfile.TemporaryDirectory() as folder:
        own = {
            "TRITON_INTERPRET": "1", "TORCHINDUCTOR_CACHE_DIR": folder, "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }  # fmt: skip
        return run_worker("benchmarks.numerics.worker", request, environment(real=False) | own, seconds=SECONDS)


__all__ = ["findings", "results"]
