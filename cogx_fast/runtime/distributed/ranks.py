"""The ranks of a job: started, watched over, and held to the same task.

Collectives wait. A rank that was killed, is stopped or has raised would leave the others waiting for the half hour of
torch's time limit, and the error that ends that names no rank. So every rank writes a sign of life into the job's store
once a second, and a thread of each reads those of the others; for a rank that has not joined yet its processor time is
such a sign. A rank that is lost ends the job: everywhere the same error says which one and why.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing.util
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from cogx_fast.runtime.distributed import processes

LOST_AFTER = 12.0
"""Seconds without a sign of life after which a rank is lost."""
_BEAT = 1.0
_ABSENT_AFTER = timedelta(minutes=30)
"""After which a rank of which nothing is known has not come: torch's own limit."""
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
    """This process among the ranks of its job, which need not have joined it yet.

    Args:
        store: the job's.
        rank: this process's number.
        size: how many there are.
    """

    lost_after = LOST_AFTER
    """Seconds without a sign of life after which a rank is lost."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._group: Any = None
        self._store = store.clone()  # a connection of its own, which no waiting call holds
        self._sign: dict[str, Any] = {"state": "runs", **processes.this_process()}
        self._signs: dict[int, dict[str, Any]] = {}
        self._seen: dict[int, float] = {}
        self._in_step: float | None = None
        self._failure: str | None = None
        self._failed, self._raised = threading.Event(), threading.Event()
        self._is_over = False
        self._write()
        multiprocessing.util.Finalize(None, self._end, exitpriority=0)  # of a script, and of a spawned process
        threading.Thread(target=self._watch, name="cogx_fast ranks", daemon=True).start()

    def meet(self) -> None:
        """Wait until every rank is there.

        Raises:
            RankError: one of them is lost, or has not come.
        """
        deadline = time.monotonic() + _ABSENT_AFTER.total_seconds()
        while absent := [rank for rank in range(self.size) if not self._store.check([_key(rank)])]:
            if self._failed.wait(_BEAT / 20):
                raise self._error()
            if time.monotonic() > deadline:
                raise RankError(f"of the job's {self.size} ranks {absent} have not joined for {_ABSENT_AFTER}")

    def form_group(self) -> None:
        """Have what ``agree`` speaks through. All ranks call it, once torch's process group is there."""
        if self._group is None:
            with self.together():
                self.meet()
                self._group = dist.new_group(backend="gloo")  # of words, not of values: never on a GPU
                dist.barrier(self._group)

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
                self._failed.wait(self.lost_after + 3 * _BEAT)
            if self._failed.is_set() and isinstance(error, Exception):
                raise error if isinstance(error, RankError) else self._error() from error
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
        others = [rank for rank in range(self.size) if rank != self.rank]
        absent = [rank for rank in others if not self._store.check([_key(rank)])]
        started = processes.of_this_job() if absent else {}
        for rank in others:
            if rank not in absent:
                sign = json.loads(self._store.get(_key(rank)))
            elif rank not in started or (not started[rank] and rank in self._signs):
                continue  # of that one nothing is known, or what was is looked at again
            else:
                sign = {"state": "starts" if started[rank] else "ended", **started[rank]}
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
                        return f"rank {rank} has ended, and this one still waits for it"
                case state:
                    process = processes.state(sign)
                    if process == "gone" and silent > 2 * _BEAT:
                        how = "was killed or has crashed" if state == "runs" else "has ended before it joined the job"
                        return f"rank {rank} (process {sign['pid']}) {how}"
                    if silent > self.lost_after:
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
        time.sleep(2 * _BEAT)  # until all have read it: torchrun ends the rest when it sees one end
        for sign in self._signs.values():  # what is stopped takes no other signal, and would be left behind
            if sign["state"] in ("starts", "runs") and processes.state(sign) == "T":
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
        if self._sign["state"] != "ended":
            time.sleep(3 * _BEAT)  # the others say it, too, before torchrun ends them because this one has


def start(lost_after: float = LOST_AFTER) -> None:
    """Join the job that torchrun started, unless the process has.

    Args:
        lost_after: seconds without a sign of life after which a rank is lost.

    Raises:
        RankError: another rank is lost before it has joined.
        ValueError: the process is part of no job.
    """
    global _ranks
    if dist.is_initialized():
        return
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(
            f"parallel is given, but this process is alone ({missing[0]} is not set): start it with torchrun "
            "--nproc-per-node N script.py (or cogx-fast generate --nproc N), or call "
            "torch.distributed.init_process_group first"
        )
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    keeps_store = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun does
    torch_distributed: Any = dist  # whose stores mypy does not see
    keeper = torch_distributed.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), size, keeps_store,
        timeout=_ABSENT_AFTER, wait_for_workers=False, multi_tenant=True,
    )  # fmt: skip
    attempt = f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    store = torch_distributed.PrefixStore(attempt, keeper)
    _ranks = Ranks(store, rank, size)
    _ranks.lost_after = lost_after
    with _ranks.together():
        _ranks.meet()  # torch would wait for half an hour, and not say for whom
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)


_ranks: Ranks | None = None


def ranks(lost_after: float) -> Ranks:
    """This process among the ranks of its job; one for all models. All ranks call it, as they make groups.

    Args:
        lost_after: seconds without a sign of life after which a rank is lost, from now on.

    Raises:
        RankError: one is.
    """
    global _ranks
    if _ranks is None:
        _ranks = Ranks(dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size())
    _ranks.lost_after = lost_after
    _ranks.form_group()
    return _ranks


def _key(rank: int) -> str:
    return f"cogx_fast/rank/{rank}"


def _is_of_a_link(error: BaseException) -> bool:
    text = str(error).lower()
    is_of_torch = isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError)
    return is_of_torch and any(word in text for word in _OF_A_LINK)


def _one_line(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]


__all__ = ["LOST_AFTER", "DisagreementError", "RankError", "Ranks", "ranks", "start"]
