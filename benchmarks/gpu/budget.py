"""Tests against the clock, each at its own risk: what crashes or hangs costs only itself.

    python -m benchmarks.gpu.budget --seconds 250 --ledger out/tests.jsonl -- -m gpu --first tests/model tests

runs pytest. Every test's beginning and end is a line of the ledger; what has ended is not run again, so that the same
command goes on where it stopped. A test is not begun with less than ``--least`` seconds left, and is ended after
``--limit``; when the process dies, or a CUDA error has made it useless, the rest goes on in a new one. What was not
run, or was cut short by the end of the time, is named at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import ROOT

LEAST_SECONDS = 20
LIMIT_SECONDS = 240
NO_TIME = "no time left"
USELESS = ("CUDA error", "cudaError", "CUBLAS_STATUS_EXECUTION_FAILED")
"""What a process says whose CUDA context cannot be used any more."""
FAILED = ("failed", "crashed", "timeout")

# ------------------------------------------------------------------------------------------------------ pytest's plugin


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("budget")
    group.addoption("--ledger", type=Path, help="a line of JSON a test; what has ended in it is not run again")
    group.addoption("--first", action="append", default=[], help="tests whose name begins so; again for the next ones")
    group.addoption("--seconds", type=float, default=float("inf"), help="after which no test is begun")
    group.addoption("--least", type=float, default=LEAST_SECONDS, help="seconds that must be left to begin a test")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--ledger"):
        config.pluginmanager.register(_Watch(config), "benchmarks.gpu.budget.watch")


class _Watch:
    def __init__(self, config: pytest.Config) -> None:
        self.path: Path = config.getoption("--ledger")
        self.last = time.monotonic() + config.getoption("--seconds") - config.getoption("--least")
        self.session: pytest.Session | None = None

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self.session = session

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        first: list[str] = config.getoption("--first")
        items.sort(
            key=lambda item: next((i for i, test in enumerate(first) if item.nodeid.startswith(test)), len(first))
        )
        planned = {item.nodeid: item for item in items}
        _write(self.path, {"planned": list(planned)})
        done = {line["test"] for line in ended(self.path)}
        config.hook.pytest_deselected(items=[planned[test] for test in planned if test in done])
        items[:] = [planned[test] for test in planned if test not in done]

    def pytest_runtest_setup(self) -> None:
        if time.monotonic() > self.last:
            pytest.skip(NO_TIME)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        _write(self.path, {"begun": nodeid, "time": time.time()})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        why = _reason(report)
        if report.when == "call" or (report.when == "setup" and not report.passed) or report.failed:
            outcome = "no time" if why.endswith(NO_TIME) and report.skipped else report.outcome
            _write(self.path, {"test": report.nodeid, "outcome": outcome, "seconds": report.duration, "why": why,
                               **dict(report.user_properties)})  # fmt: skip
        if report.failed and self.session is not None and any(words in report.longreprtext for words in USELESS):
            self.session.shouldstop = "a CUDA error has made this process useless"


def _reason(report: pytest.TestReport) -> str:
    if report.skipped and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return (crash.message if crash else report.longreprtext)[:2000]


def _write(path: Path, line: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


# ----------------------------------------------------------------------------------------------------------- the ledger


def read(path: Path) -> list[dict[str, Any]]:
    """The ledger's lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def ended(path: Path) -> list[dict[str, Any]]:
    """The last line of each test that has ended."""
    return list({line["test"]: line for line in read(path) if line.get("outcome", "no time") != "no time"}.values())


def not_run(path: Path) -> list[str]:
    """Planned tests that have not ended."""
    done = {line["test"] for line in ended(path)}
    return [test for test in dict.fromkeys(test for line in read(path) for test in line.get("planned", ()))
            if test not in done]  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- the runner


def run(arguments: Sequence[str], *, seconds: float, ledger: Path, least: float, limit: float) -> None:
    """Run pytest with these arguments until everything has ended or the time is up."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > least:
        before = len(read(ledger))
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "benchmarks.gpu.budget",
                   f"--ledger={ledger}", f"--seconds={left}", f"--least={least}", f"--timeout={limit}",
                   "--timeout-method=thread", *arguments]  # fmt: skip
        alone = {name: text for name, text in os.environ.items() if not name.startswith("PYTEST_XDIST")}
        child = subprocess.Popen(command, cwd=ROOT, env=alone, start_new_session=True)  # else it would not time
        try:
            status: int | None = child.wait(left)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        lines = read(ledger)[before:]
        culprit = _culprit(lines)
        if culprit is not None:
            took = time.time() - culprit["time"]
            outcome = "timeout" if took > limit else "no time" if status is None else "crashed"
            _write(ledger, {"test": culprit["begun"], "outcome": outcome, "seconds": took,
                            "why": f"its process ended before it did (status {status})"})  # fmt: skip
        elif status != pytest.ExitCode.INTERRUPTED or not any("test" in line for line in lines):
            return


def _culprit(lines: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The test that was begun and did not end."""
    begun = [line for line in lines if "begun" in line]
    done = {line.get("test") for line in lines}
    return begun[-1] if begun and begun[-1]["begun"] not in done else None


def summary(ledger: Path) -> list[str]:
    """What failed and what was not run."""
    done = ended(ledger)
    bad = [f"{line['outcome'].upper()}: {short(line['test'])}: {line['why'][:600]}" for line in done
           if line["outcome"] in FAILED]  # fmt: skip
    left = not_run(ledger)
    named = [f"NO TIME LEFT for {len(left)}: {', '.join(map(short, left))}"] if left else []
    return [*bad, *named, f"{len(done)} ended, {len(bad)} of them badly"]


def short(test: str) -> str:
    """A case's name, or a test's."""
    return test.partition("::test_case[")[2].removesuffix("]") or test


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.budget", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, required=True, help="for everything")
    parser.add_argument("--ledger", type=Path, required=True, metavar="FILE", help="what has ended, a line a test")
    parser.add_argument("--least", type=float, default=LEAST_SECONDS, help="to begin a test (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=LIMIT_SECONDS, help="of a test (default: %(default)s)")
    parser.add_argument("arguments", nargs="*", metavar="ARGUMENT", help="pytest's, after --")
    options = parser.parse_args(arguments)
    run(options.arguments, seconds=options.seconds, ledger=options.ledger.absolute(), least=options.least,
        limit=options.limit)  # fmt: skip
    print("\n".join(summary(options.ledger)))
    return int(any(line["outcome"] in FAILED for line in ended(options.ledger)))


if __name__ == "__main__":
    sys.exit(main())
