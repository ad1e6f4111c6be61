"""A case in a process of its own, which its time limit ends: what goes wrong in it costs only itself."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.cases import Case

_TAIL = 2000


def start_method(device: str) -> str:
    """How processes are started: forked off a server that has imported everything, which costs nothing, or, for CUDA,
    which does not survive a fork once anything has touched it, each from nothing.
    """
    return "spawn" if device == "cuda" else "forkserver"


def run(case: Case, device: str, *, limit: float, method: str | None = None) -> dict[str, Any]:
    """Run a case.

    Args:
        case: what to run.
        device: "cuda" or "cpu".
        limit: seconds from its start.
        method: of starting the process, if another than the device's own.

    Returns:
        What it found, with ``status``: "done", "red" (wrong results, so not timed), "unsupported", "failed" or
        "timeout"; ``seconds`` it took; for the last two, the end of its output under ``log``.
    """
    context: Any = multiprocessing.get_context(method or start_method(device))
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload(["benchmarks.gpu.preload"])
    with tempfile.TemporaryDirectory(prefix="battery-") as folder:
        out, log = Path(folder) / "result.json", Path(folder) / "log"
        begin = time.perf_counter()
        child = context.Process(target=enter, args=(case, device, str(out), str(log)), daemon=False)
        child.start()
        child.join(limit)
        timeout = child.is_alive()
        _end(child.pid)
        child.join()
        result: dict[str, Any] = {"case": case.name, "seconds": time.perf_counter() - begin}
        if timeout:
            result |= {"status": "timeout", "error": f"ended after its limit of {limit:.0f} s"}
        elif not out.is_file():
            result |= {"status": "failed", "error": f"the process ended with status {child.exitcode}"}
        else:
            result |= json.loads(out.read_text())
        if result["status"] in ("failed", "timeout") and log.is_file():
            result["log"] = log.read_text(errors="replace")[-_TAIL:]
        return result


def enter(case: Case, device: str, out: str, log: str) -> None:
    """The new process: a group of its own, its output in a file, an empty cache for what it compiles."""
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(out).parent / "cache")
    from benchmarks.gpu.worker import work

    answer = work(case, device)
    temporary = Path(f"{out}.part")
    temporary.write_text(json.dumps(answer))
    temporary.replace(out)


def _end(group: int) -> None:
    """End what is left of a case: its process and those that it started, which are a group of their own."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):  # before it had its group
        os.kill(group, signal.SIGKILL)
