"""A command carried out by several processes of this machine, which torchrun starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any


def is_worker() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def start(processes: int, arguments: Sequence[str]) -> dict[str, Any]:
    """Run ``cogx-fast`` with these arguments in so many processes.

    Args:
        processes: how many.
        arguments: of the command line; with ``--json``.

    Returns:
        The report of rank 0.

    Raises:
        ChildProcessError: (an OSError) it failed; what it said stands on stderr.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*torchrun, "--local-ranks-filter", "0", "-m", "cogx_fast", *arguments]
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))}
    finished = subprocess.run(command, env=threads | os.environ, stdout=subprocess.PIPE, text=True, check=False)
    if finished.returncode:
        raise ChildProcessError(f"{processes} processes failed: the error stands above")
    report: dict[str, Any] = json.loads(finished.stdout)
    return report


__all__ = ["is_worker", "start"]
