"""These tests run on the stand-in device (benchmarks/standin), a process for each card; elsewhere none is collected.

``make test-cuda-standin`` runs them all; ``python -m tests.cuda_standin --card rtx4090 -k offload`` some.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.standin import journal

if not journal.is_loaded():
    collect_ignore_glob = ["test_*.py"]

CARD = os.environ.get("STANDIN_CARD", "h100")
"""The short name of the card that this process has."""
HALF = os.environ.get("STANDIN_HALF", "")
"""0 or 1: every other file of the card's; nothing: all of them."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave other processes their tests: a test without the mark ``cards`` is the H100's."""
    here, elsewhere = [], []
    files = sorted({item.path for item in items})
    for item in items:
        mark = item.get_closest_marker("cards")
        is_here = CARD in (mark.args if mark else ("h100",)) and HALF in ("", str(files.index(item.path) % 2))
        (here if is_here else elsewhere).append(item)
    # With torch 2.11, once a graph was compiled for another batch, compiled and counted steps hold a stream more.
    items[:] = sorted(here, key=lambda item: item.path.name != "test_memory.py")
    config.hook.pytest_deselected(items=elsewhere)


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test starts with nothing compiled, allocated, remembered or noted."""
    import torch

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # where `auto` remembers what it measured
    torch.cuda.init()
    for device in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(device)
    torch._dynamo.utils.counters.clear()
    journal.clear()
    yield
    assert torch.cuda.current_device() == 0, "something made another device the current one"
    torch._dynamo.reset()
    gc.unfreeze()  # what stayed of the file before (tests/conftest.py) may be garbage by now, with tensors in it
    gc.collect()
    torch.cuda.empty_cache()


_processor_seconds: dict[str, float] = {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[Any]:
    """Count each test's processor time, that of its processes too."""
    start = os.times()
    done = yield
    _processor_seconds[item.nodeid] = sum(os.times()[:4]) - sum(start[:4])
    return done


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Name the tests that took the most of it: the whole suite has half an hour of two cores."""
    if not _processor_seconds:
        return
    terminalreporter.section(f"{sum(_processor_seconds.values()):.0f} processor seconds")
    for name, seconds in sorted(_processor_seconds.items(), key=lambda item: -item[1])[:10]:
        terminalreporter.write_line(f"{seconds:6.1f}  {name.rpartition('/')[2]}")
