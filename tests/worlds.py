"""Jobs of several real processes over gloo, for tests: forked from a server that has imported everything once."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

TOKEN = "127.0.0.1"
PRELOADED = [
    "torch._dynamo", "torch.distributed.device_mesh", "torchao.quantization", "cogx_fast.runtime.distributed.parallel",
    "quant.apply", "diffusers.models.transformers.cogvideox_transformer_3d", "tests.worlds",
]  # fmt: skip
"""What every rank would import otherwise, which takes longer than what it is there for."""


@dataclass(frozen=True)
class Ended:
    """How a rank ended."""

    status: int | None
    """Its exit status, negative for a signal; None: it had to be killed after the time limit."""
    result: Any
    """What its function returned; None where it did not."""
    text: str
    """What it wrote to stderr."""


def work(
    function: str, joined: bool, rank: int, size: int, port: int, results: Any, log: str, arguments: dict[str, Any]
) -> None:
    """What a rank does."""
    import torch
    import torch.distributed as dist

    sys.stderr.flush()
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT, 0o600), 2)
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": TOKEN, "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    if joined:
        store = dist.TCPStore(TOKEN, port, is_master=False)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    module, _, name = function.partition(":")
    results.send(getattr(importlib.import_module(module), name)(rank, **arguments))


class World:
    """So many ranks that run ``function(rank, **arguments)``.

    Args:
        function: "module:name".
        size: ranks.
        directory: where they write what they say.
        joined: whether they have joined torch's process group before the function.
    """

    def __init__(self, function: str, size: int, directory: Any, *, joined: bool = True, **arguments: Any) -> None:
        import torch.distributed as dist

        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._store = dist.TCPStore(TOKEN, 0, is_master=True, wait_for_workers=False)
        self._logs = [str(directory / f"rank{rank}.txt") for rank in range(size)]
        pipes = [context.Pipe(duplex=False) for _ in range(size)]
        self._results: list[Any] = [receive for receive, _ in pipes]
        self.processes = [
            context.Process(
                target=work,
                args=(function, joined, rank, size, self._store.port, pipes[rank][1], self._logs[rank], arguments),
            )
            for rank in range(size)
        ]
        for process in self.processes:
            process.start()
        for _, send in pipes:
            send.close()

    def wait(self, seconds: float) -> list[Ended]:
        """Until all have ended; what has not by then is killed."""
        deadline = time.monotonic() + seconds
        ended = []
        results = [self._take(rank, deadline) for rank in range(len(self.processes))]
        for process, result, log in zip(self.processes, results, self._logs, strict=True):
            process.join(max(0.1, deadline - time.monotonic()))
            status = process.exitcode
            if status is None:
                process.kill()
                process.join()
            with open(log, encoding="utf-8", errors="replace") as file:
                ended.append(Ended(status, result, file.read()))
        return ended

    def _take(self, rank: int, deadline: float) -> Any:
        try:
            if self._results[rank].poll(max(0.1, deadline - time.monotonic())):
                return self._results[rank].recv()
        except EOFError:
            pass
        return None


def results(function: str, size: int, directory: Any, *, seconds: float, **arguments: Any) -> Sequence[Any]:
    """What every rank returned, all of which have to end well."""
    ended = World(function, size, directory, **arguments).wait(seconds)
    assert [each.status for each in ended] == [0] * size, "\n".join(each.text[-3000:] for each in ended)
    return [each.result for each in ended]
