"""The ranks of a job: started, watched over, and held to the same task.

Collectives wait. A rank that was killed, is stopped or has raised would leave the others waiting for the half hour of
torch's time limit, and the error that ends that names no rank. So every rank writes a sign of life into the job's store
once a second, and a thread of each reads those of the others. A rank that is lost ends the job: everywhere the same
error says which one and why.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing.util
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

LOST_AFTER = 12.0
"""Seconds without a sign of life after which a rank is lost."""
_BEAT = 1.0
_GRACE = 4.0
"""Seconds in which the main thread may raise the error itself; it cannot while a collective holds it."""
_FACTS_BYTES = 8192
_OF_A_LINK = ("gloo", "nccl", "connection", "socket", "peer", "store", "timed out", "timeout")
"""Words of torch's errors when a peer is gone."""


class RankError(ConnectionError):
    """Another rank of the job is lost; the message says which one, and why."""


class DisagreementError(ValueError):
    """Ranks were given different things; every rank raises the same, and the job may go on."""


class Ranks:
    """This process among the ranks of its job.

    Args:
        lost_after: seconds without a sign of life after which a rank is lost.
    """

    def __init__(self, lost_after: float = LOST_AFTER) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._lost_after = lost_after
        self._group: Any = dist.new_group(backend="gloo")  # of words, not of values: never on a GPU
        store: Any = dist.distributed_c10d._get_default_store()
        self._store = store.clone()  # a connection of its own, which no waiting call holds
        self._sign: dict[str, Any] = {"state": "runs", **_whoami()}
        self._signs: dict[int, dict[str, Any]] = {}
        self._seen: dict[int, float] = {}
        self._in_step: float | None = None
        self._failure: str | None = None
        self._failed, self._raised = threading.Event(), threading.Event()
        self._is_over = False
        self._write()
        dist.barrier(self._group)
        multiprocessing.util.Finalize(None, self._end, exitpriority=0)  # of a script, and of a spawned process
        threading.Thread(target=self._watch, name="cogx_fast ranks", daemon=True).start()

    # -- in a step ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What all ranks do inside the ``with`` block, each of them needs the others for.

        Raises:
            RankError: one of them is lost, before or meanwhile.
        """
        if self._failed.is_set():
            raise self._error()
        self._in_step = time.monotonic()
        try:
            yield
        except DisagreementError:
            raise
        except BaseException as error:
            if _is_of_a_link(error):  # what it means is known when it is known who is gone
                self._failed.wait(self._lost_after + 3 * _BEAT)
            if self._failed.is_set() and isinstance(error, Exception):
                raise self._error() from error
            self._tell(error)
            raise
        finally:
            self._in_step = None

    def agree(self, facts: Mapping[str, str]) -> None:
        """See that every rank is given the same.

        Args:
            facts: what has to be the same, by its name.

        Raises:
            DisagreementError: on every rank, where something differs: what, and on which rank.
        """
        text = json.dumps(dict(facts)).encode()
        if len(text) > _FACTS_BYTES:
            raise ValueError(f"{len(text)} bytes of facts to compare, expected {_FACTS_BYTES} at most")
        mine = torch.frombuffer(bytearray(text.ljust(_FACTS_BYTES)), dtype=torch.uint8)
        gathered = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(gathered, mine, group=self._group)
        all_facts = [json.loads(bytes(each.tolist())) for each in gathered]
        differing = []
        for name in dict.fromkeys(name for each in all_facts for name in each):
            values = [each.get(name, "nothing") for each in all_facts]
            for rank, value in enumerate(values):
                if value != values[0]:
                    differing.append(f"rank {rank} has another {name} ({value}) than rank 0 ({values[0]})")
        if differing:
            raise DisagreementError(
                f"{'; '.join(differing[:4])}. Every rank must run the same pipeline with the same arguments, and with "
                "generator=torch.Generator().manual_seed(…)"
            )

    def _error(self) -> RankError:
        self._raised.set()
        return RankError(str(self._failure))

    def _tell(self, error: BaseException) -> None:
        self._sign |= {"state": "failed", "cause": _one_line(error)}
        with contextlib.suppress(RuntimeError):  # the store may have gone with the others
            self._write()

    # -- signs of life ------------------------------------------------------------------------------------------------

    def _write(self) -> None:
        self._sign["beat"] = self._sign.get("beat", 0) + 1
        self._store.set(_key(self.rank), json.dumps(self._sign))

    def _read(self) -> None:
        for rank in range(self.size):
            if rank == self.rank:
                continue
            sign = json.loads(self._store.get(_key(rank)))
            if sign != self._signs.get(rank):
                self._signs[rank], self._seen[rank] = sign, time.monotonic()

    def _watch(self) -> None:
        while not self._is_over:
            try:
                self._write()
                self._read()
                cause = self._look()
            except RuntimeError:
                cause = self._store_lost()
            if cause is not None:
                return self._fail(cause)
            time.sleep(_BEAT)
        return None

    def _look(self) -> str | None:
        """Why the job cannot go on, or None."""
        now = time.monotonic()
        waits = self._in_step is not None and now - self._in_step > 3 * _BEAT
        for rank, sign in self._signs.items():
            silent = now - self._seen[rank]
            match sign["state"]:
                case "lost":  # another has found out
                    return str(sign["cause"])
                case "failed":
                    return f"rank {rank} failed: {sign['cause']}"
                case "ended":
                    if waits and silent > 3 * _BEAT:
                        return f"rank {rank} has ended, and this one still waits for it in a step"
                case _:
                    process = _process_state(sign)
                    if process == "gone" and silent > 2 * _BEAT:
                        return f"rank {rank} (process {sign['pid']}) was killed or has crashed"
                    if silent > self._lost_after:
                        is_stopped = " and is stopped" if process == "T" else ""
                        where = f"process {sign['pid']} on {sign['host']}"
                        return f"rank {rank} ({where}) has given no sign of life for {silent:.0f} s{is_stopped}"
        return None

    def _store_lost(self) -> str | None:
        if self._in_step is None:  # the job may be over elsewhere; a next step will say
            self._is_over = True
            return None
        return "the job's store is gone, and with it the rank that held it (rank 0, or torchrun)"

    def _fail(self, cause: str) -> None:
        self._failure = cause
        self._sign |= {"state": "lost", "cause": cause}
        with contextlib.suppress(RuntimeError):
            self._write()
        self._failed.set()
        for sign in self._signs.values():  # what is stopped takes no other signal, and would be left behind
            if sign["state"] == "runs" and _process_state(sign) == "T":
                os.kill(sign["pid"], signal.SIGKILL)
        if self._in_step is None or not self._raised.wait(_GRACE):
            self._raised.wait(_GRACE)
        if self._raised.is_set():
            threading.main_thread().join()
            time.sleep(_GRACE)  # time to end by itself; what waits for a peer in the interpreter's end does not
        else:
            sys.stderr.write(f"cogx_fast: {cause}. Rank {self.rank} ends, which cannot go on without it\n")
        sys.stderr.flush()
        os._exit(1)

    def _end(self) -> None:
        """At the end of the process."""
        self._is_over = True
        error = getattr(sys, "last_value", None) or sys.exc_info()[1]  # what ended it
        is_well = error is None or (isinstance(error, SystemExit) and not error.code)
        if self._sign["state"] == "runs":
            self._sign |= {"state": "ended"} if is_well else {"state": "failed", "cause": _one_line(error)}
            with contextlib.suppress(RuntimeError):
                self._write()


def start() -> None:
    """Join the job that torchrun started, unless the process has.

    Raises:
        ValueError: it is part of none.
    """
    if dist.is_initialized():
        return
    if "RANK" not in os.environ:
        raise ValueError(
            "parallel is given, but this process is alone: start it with torchrun --nproc-per-node N script.py (or "
            "cogx-fast generate --nproc N), or call torch.distributed.init_process_group first"
        )
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        dist.init_process_group("gloo")


_ranks: Ranks | None = None


def ranks(lost_after: float) -> Ranks:
    """This process among the ranks of its job; one for all models. All ranks call it, as they make groups."""
    global _ranks
    if _ranks is None:
        _ranks = Ranks(lost_after)
    return _ranks


def _key(rank: int) -> str:
    return f"cogx_fast/rank/{rank}"


def _whoami() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": _host(), "started": _stat(os.getpid())[1]}


def _host() -> str:
    """This machine, and within it the space of process numbers."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def _stat(pid: int) -> tuple[str, str]:
    """A process's state (R, S, T, Z, …) and when it started; empty where that cannot be read."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]


def _process_state(sign: Mapping[str, Any]) -> str | None:
    """Of a process on this machine: "gone", or its letter; None elsewhere."""
    if sign["host"] != _host() or not sign["started"]:
        return None
    state, started = _stat(sign["pid"])
    return "gone" if started != sign["started"] or state in "ZX" else state


def _is_of_a_link(error: BaseException) -> bool:
    text = str(error).lower()
    is_of_torch = isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError)
    return is_of_torch and any(word in text for word in _OF_A_LINK)


def _one_line(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]


__all__ = ["LOST_AFTER", "DisagreementError", "RankError", "Ranks", "ranks", "start"]
