"""What becomes of a job when one of its ranks is lost, or was given something else."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests import worlds

SHARED = "tests.runtime.shared_steps"
FAULTS: dict[str, tuple[dict[str, Any], int | None, str]] = {
    "killed": ({}, signal.SIGKILL, r"rank 1 (process {pid}) was killed or has crashed"),
    "stopped": ({}, signal.SIGSTOP, r"rank 1 (process {pid}"),
    "raises in a step": ({"raises": "in a step"}, None, "rank 1 failed: ValueError: a hook failed"),
    "raises between steps": ({"raises": "between steps"}, None, "rank 1 failed: ValueError: the disk is full"),
    "ends too early": ({"raises": "ends"}, None, "rank 1 has ended, and this one still waits for it"),
    "stopped before its first step": ({"hangs": "before its first step"}, None, "s and is stopped"),
    "hangs before it takes part": ({"hangs": "in its own code"}, None, "has given no sign of life for 4 s"),
}
BEFORE_JOINING = {
    "stopped": ("kill -STOP $$", "has given no sign of life for 4 s and is stopped"),
    "hangs": ("exec sleep 25", "has given no sign of life for 4 s"),
    "killed, and was only slow before": (
        "end=$(($(date +%s) + 10)); while [ $(date +%s) -lt $end ]; do sleep 0.1; done; kill -KILL $$",
        "has ended before it joined the job",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_loss_of_a_rank_ends_the_job_and_is_named_on_every_other(name: str, tmp_path: Path) -> None:
    fault, number, expected = FAULTS[name]
    world = worlds.World(f"{SHARED}:go_on", 3, tmp_path, fault=fault, ready=str(tmp_path / "ready"))
    pid = world.processes[1].pid
    assert pid is not None
    if number is not None:
        deadline = time.monotonic() + 200
        while len(list(tmp_path.glob("ready*"))) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.kill(pid, number)
        began = time.monotonic()
        ended = world.wait(30)
        assert time.monotonic() - began < 30
    else:
        ended = world.wait(230)
    for rank in (0, 2):
        assert ended[rank].status == 1, ended[rank]
        assert expected.format(pid=pid) in ended[rank].text
    assert ended[1].status is not None, "a process is left"


def test_a_rank_that_does_not_join_ends_the_job_and_is_named_on_every_other(tmp_path: Path) -> None:
    worlds_by_name = {}
    for name, (command, _) in BEFORE_JOINING.items():
        (tmp_path / name).mkdir()
        worlds_by_name[name] = worlds.World(f"{SHARED}:join", 3, tmp_path / name, joined=False, command=command)
    began = time.monotonic()
    for name, world in worlds_by_name.items():
        ended = world.wait(28)
        assert time.monotonic() - began < 30
        for rank in (0, 2):
            assert ended[rank].status == 1, (name, ended)
            assert f"RankError: rank 1 (process {world.processes[1].pid}" in ended[rank].text, (name, ended)
            assert BEFORE_JOINING[name][1] in ended[rank].text, (name, ended)
        assert ended[1].status is not None, f"{name}: a process is left"


def test_what_differs_is_named_on_every_rank_and_the_job_may_go_on(tmp_path: Path) -> None:
    for said in worlds.results(f"{SHARED}:disagree", 3, tmp_path, seconds=250):
        for name, message in said.items():
            expected = "nothing was said" if name.startswith("none") else f"rank 1 has another {name}"
            assert expected in message, (name, message)
            assert "rank 2 has another" not in message
