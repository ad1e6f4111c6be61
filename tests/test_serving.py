"""The serving example with Ray on this machine: real HTTP, two replicas of the tiny pipeline, one of them killed."""

from __future__ import annotations

import asyncio
import http.client
import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="the extra serve is not installed")
psutil = pytest.importorskip("psutil")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "serve_ray.py"
WAITING, LOAD_SECONDS = 4, 60.0


class Server:
    def __init__(self, directory: Path, *options: object) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._log = (directory / "log.txt").open("wb")
        command = [sys.executable, "-W", "ignore", EXAMPLE, "--port", str(self.port), *map(str, options)]
        environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(EXAMPLE.parent.parent)}
        self.process = subprocess.Popen(command, cwd=directory, env=environment, stdout=self._log, stderr=self._log)
        deadline = time.monotonic() + 300
        while b"ready on port" not in (directory / "log.txt").read_bytes():
            assert self.process.poll() is None, (directory / "log.txt").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.5)

    def ask(self, path: str, name: str = "", **body: Any) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        headers = {"Content-Type": "application/json"} | ({"X-Request-Id": name} if name else {})
        connection.request("POST" if body else "GET", path, json.dumps(body) if body else None, headers)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, content

    def facts(self, path: str) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads(self.ask(path)[1])
        return facts

    def makers(self) -> list[Any]:
        below = psutil.Process(self.process.pid).children(recursive=True)
        return [each for each in below if "ServeReplica:videos:Maker" in " ".join(each.cmdline())]

    def until(self, path: str, **wanted: Any) -> None:
        deadline = time.monotonic() + 120
        while not wanted.items() <= self.facts(path).items():
            assert time.monotonic() < deadline, self.facts(path)
            time.sleep(0.05)

    def stop(self) -> None:
        below = psutil.Process(self.process.pid).children(recursive=True)
        self.process.terminate()
        self.process.wait(60)
        _, left = psutil.wait_procs(below, 30)
        self._log.close()
        assert left == []


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("serve"), "--replicas", 2, "--waiting", WAITING)
    yield server
    server.stop()


SMALL = {"prompt": "a seven", "frames": 1, "height": 64, "width": 64}


def test_a_video_and_its_progress(server: Server) -> None:
    status, video = server.ask("/videos", "first", **SMALL, steps=2)
    assert (status, video[4:8]) == (200, b"ftyp")
    assert server.facts("/progress/first") == {"state": "done", "step": 2, "steps": 2}
    assert server.ask("/progress/unknown")[0] == 404
    assert server.ask("/videos", **SMALL, steps=2)[1] == video  # the same seed


def test_what_cannot_be_is_a_4xx_that_says_why(server: Server) -> None:
    for change, expected in (
        ({"prompt": ""}, "prompt"),
        ({"prompt": "seven " * 500}, "tokens, the model reads"),
        ({"height": 65}, "height"),
        ({"frames": 0}, "frames"),
        ({"steps": 0}, "steps"),
        ({"seed": -1}, "seed"),
        ({"sead": 1}, "sead"),
    ):
        status, content = server.ask("/videos", **(SMALL | change))
        assert (status, expected in content.decode()) == (422, True), (change, content)


def test_who_goes_away_is_worked_for_no_longer(server: Server) -> None:
    body = json.dumps(SMALL | {"steps": 200, "frames": 17})
    began = time.monotonic()
    names = ("one", "two")  # for each replica
    connections = []
    for name in names:
        connections.append(http.client.HTTPConnection("127.0.0.1", server.port))
        connections[-1].request("POST", "/videos", body, {"Content-Type": "application/json", "X-Request-Id": name})
    for name in names:
        server.until(f"/progress/{name}", state="denoising")
    while (step := min(server.facts(f"/progress/{name}")["step"] for name in names)) < 10:
        time.sleep(0.05)
    rest = (200 - step) * (time.monotonic() - began) / step
    for connection in connections:
        connection.sock.close()
    began = time.monotonic()
    for name in names:
        server.until(f"/progress/{name}", state="cancelled")
        assert server.ask("/videos", **SMALL, steps=1)[0] == 200
    assert time.monotonic() - began < rest / 3
    server.until("/health", waiting=0)


def test_no_accepted_request_is_lost_under_load_when_a_replica_is_killed(server: Server) -> None:
    ends = time.monotonic() + LOAD_SECONDS
    answers: Counter[int] = Counter()
    seconds: list[float] = []

    def client(number: int) -> None:
        seed = number * 1000
        while time.monotonic() < ends:
            began = time.monotonic()
            status, content = server.ask("/videos", **SMALL, steps=10, seed=seed)
            answers[status] += 1
            if status == 200:
                assert content[4:8] == b"ftyp"
                seconds.append(time.monotonic() - began)
                seed += 1
            else:
                time.sleep(0.5)

    clients = [threading.Thread(target=client, args=(number,)) for number in range(WAITING + 2)]
    for each in clients:
        each.start()
    time.sleep(LOAD_SECONDS / 2)
    before = server.makers()
    assert len(before) == 2
    before[0].kill()
    for each in clients:
        each.join()
    assert answers.keys() == {200, 429}, answers  # so every request that was accepted was delivered
    server.until("/health", replicas=2, waiting=0)
    assert {each.pid for each in server.makers()} != {each.pid for each in before}
    seconds.sort()
    print(f"{answers[200]} videos, {answers[429]} × 429; median {seconds[len(seconds) // 2]:.1f} s, "
          f"longest {seconds[-1]:.1f} s")  # fmt: skip


def test_a_time_limit_and_no_replica(tmp_path: Path) -> None:
    server = Server(tmp_path, "--replicas", 1, "--seconds", 2)
    try:
        assert server.ask("/videos", "slow", **(SMALL | {"frames": 17}), steps=200)[0] == 504
        assert server.facts("/progress/slow")["state"] == "failed"
        server.until("/health", waiting=0)
        assert server.ask("/videos", **SMALL, steps=1)[0] in (200, 504)
    finally:
        server.stop()


def test_a_replica_whose_pipeline_raised_is_not_healthy() -> None:
    spec = importlib.util.spec_from_file_location("serve_ray", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    maker = example.Maker.func_or_class("tiny", None, False)
    maker.check_health()

    async def make() -> None:
        async for _ in maker.make(SMALL | {"steps": 1, "negative_prompt": "", "guidance": 6.0, "seed": 0}):
            pass

    asyncio.run(make())
    maker.check_health()
    maker._pipe.vae = None
    with pytest.raises(AttributeError):
        asyncio.run(make())
    with pytest.raises(RuntimeError, match="AttributeError"):
        maker.check_health()
