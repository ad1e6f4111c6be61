"""What Linux tells of the processes of a job on this machine, whether they have joined it or not.

What starts a job (torchrun, and others) gives every rank its number in the environment, which can be read from
outside. So of a rank that has said nothing yet it is known that it is there, whether it is stopped, and whether it does
anything.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

_OF_A_JOB = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE")
"""What all ranks of a job have in their environment, and other jobs do not."""


class _Process(NamedTuple):
    pid: int
    state: str
    """R, S, D, T, Z, …"""
    ticks: int
    """Of processor time that it has used, and those whose end it has waited for."""
    started: str


def this_process() -> dict[str, Any]:
    """By what others know this process again (``state``)."""
    process = _read(os.getpid())
    return {"pid": os.getpid(), "host": _host(), "started": process.started if process else ""}


def state(known: Mapping[str, Any]) -> str | None:
    """Of a process on this machine: "gone", or the letter of its state; None elsewhere.

    Args:
        known: what ``this_process`` said there.
    """
    if known["host"] != _host() or not known["started"]:
        return None
    process = _read(known["pid"])
    return "gone" if process is None or process.started != known["started"] or process.state in "ZX" else process.state


def of_this_job() -> dict[int, dict[str, Any]]:
    """The ranks of this process's job on this machine, as they were started: for each what ``state`` takes, and what
    changes while it does something; {} for one that should be there and is not."""
    found: dict[int, list[_Process]] = {}
    for pid in filter(str.isdecimal, os.listdir("/proc") if os.path.isdir("/proc") else ()):
        environment = _environment(pid)
        if environment and all(environment.get(name) == os.environ.get(name) for name in _OF_A_JOB):
            found.setdefault(int(environment["RANK"]), []).extend(filter(None, [_read(int(pid))]))
    ranks: dict[int, dict[str, Any]] = {rank: {} for rank in _ranks_here()}
    for rank, processes in found.items():
        if alive := [each for each in processes if each.state not in "ZX"]:
            first = min(alive, key=lambda each: (each.state != "T", int(each.started)))  # a stopped one tells most
            moved = time.monotonic() if any(each.state == "D" for each in alive) else 0.0  # a disk does the work
            does = [sum(each.ticks for each in alive), moved]
            ranks[rank] = {"pid": first.pid, "host": _host(), "started": first.started, "does": does}
    return ranks


def _ranks_here() -> Iterator[int]:
    """Which ranks this machine has, where this one was told so as it was started, and so all were."""
    environment = _environment("self")
    with contextlib.suppress(KeyError, ValueError):  # not everything that starts jobs says so
        first = int(environment["RANK"]) - int(environment["LOCAL_RANK"])
        yield from range(first, first + int(environment["LOCAL_WORLD_SIZE"]))


def _environment(pid: str) -> dict[str, str]:
    """What a process was started with, if it is a rank of a job; {} where it cannot be read."""
    try:
        pairs = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    found = {name: value for name, equals, value in (pair.partition("=") for pair in pairs) if equals}
    return found if found.get("RANK", "").isdecimal() else {}


def _host() -> str:
    """This machine, and within it the space of process numbers."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def _read(pid: int) -> _Process | None:
    """A process; None where there is none, or it cannot be read."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return _Process(pid, fields[0], sum(map(int, fields[11:15])), fields[19])


__all__ = ["of_this_job", "state", "this_process"]
