"""The options of the suite, and what its cases share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import suite
from benchmarks.gpu.cases import plan


class Playback:
    """A timer for pytest-benchmark, which times one function alone: it plays back what was timed in turns."""

    now = 0.0

    def __call__(self) -> float:
        """The moment that was reached."""
        return self.now

    def step(self, seconds: Iterator[float]) -> None:
        """Let a step's time pass."""
        self.now += next(seconds)


PLAYBACK = Playback()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gpu")
    group.addoption("--device", default="cuda", choices=("cuda", "cpu"), help="where (default: cuda)")
    group.addoption("--quick", action="store_true", help="toy sizes: every line runs, the times mean nothing")
    group.addoption("--baselines", type=Path, default=suite.EXPECTED, help="the tables' folder")
    group.addoption("--accept", action="store_true", help="record what is measured, and hold nothing against it")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("torch sees no GPU here: --device cpu --quick tries the suite itself")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = plan(quick=metafunc.config.getoption("--quick"))
        metafunc.parametrize("case", [pytest.param(case, id=str(case)) for case in cases])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=PLAYBACK))


@pytest.fixture(scope="session")
def gpu(request: pytest.FixtureRequest) -> suite.Suite:
    """The suite on the device that was asked for."""
    option = request.config.getoption
    return suite.Suite(torch.device(option("--device")), quick=option("--quick"), baselines=option("--baselines"),
                       accept=option("--accept"))  # fmt: skip


@pytest.fixture
def playback() -> Playback:
    """The timer of every test here."""
    return PLAYBACK
