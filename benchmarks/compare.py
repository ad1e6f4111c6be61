"""Two revisions in turns on one machine (``make bench-compare BASE=<rev>``).

    python -m benchmarks.compare BASE [--case small/compiled] [--processes 2] [--rounds 10]

BASE is checked out beside the working tree; what is compared with it is the working tree as it is. For each case a
process of either runs steps when told to, in turns; new pairs of processes take over, because a process's luck with
addresses and caches holds for its whole life. A round's ratio is between the medians of its steps.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from benchmarks import drawing, environment
from benchmarks.stepper import CASES
from cogx_fast.measure import timing
from cogx_fast.terminal import table

STEPPER = Path(__file__).with_name("stepper.py")
PICTURE = environment.ROOT / "out" / "benchmarks" / "compare.png"
STEPS = 3
"""Of each side in a round."""


class Stepper:
    """A process that steps one revision's model.

    Args:
        tree: the revision's files.
        case: one of ``CASES``.

    Raises:
        RuntimeError: it does not start, or takes the package from elsewhere.
    """

    def __init__(self, tree: Path, case: str) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(STEPPER), case],
            env={**os.environ, "PYTHONPATH": str(tree)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            self.facts = self._read()
            if not Path(self.facts["package"]).is_relative_to(tree):
                raise RuntimeError(f"{self.facts['package']} was imported, expected the package in {tree}")
        except RuntimeError:
            self._child.kill()
            self._child.communicate()
            raise

    def step(self, number: int) -> list[float]:
        """Seconds of that many steps."""
        assert self._child.stdin is not None
        self._child.stdin.write(f"{number}\n")
        self._child.stdin.flush()
        seconds: list[float] = self._read()
        return seconds

    def _read(self) -> Any:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise RuntimeError(f"the process that runs the steps ended with status {self._child.wait()}")
        return json.loads(line)

    def __enter__(self) -> Stepper:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._child.communicate()  # closes its input, which ends it


@contextlib.contextmanager
def checked_out(revision: str) -> Iterator[Path]:
    """The files of a revision, in a worktree that is removed again.

    Raises:
        ValueError: there is no such revision.
    """
    commit = _git("rev-parse", "--verify", f"{revision}^{{commit}}")
    with tempfile.TemporaryDirectory(prefix="bench-compare-") as folder:
        tree = Path(folder) / "tree"
        _git("worktree", "add", "--detach", str(tree), commit)
        try:
            yield tree
        finally:
            _git("worktree", "remove", "--force", str(tree))


def compare(
    base: Path, head: Path, case: str, *, processes: int, rounds: int
) -> tuple[timing.Interval, dict[str, list[float]]]:
    """Run a case on both in turns.

    Returns:
        The ratio of head to base, and both sides' seconds a step by round.
    """
    seconds: dict[str, list[float]] = {"base": [], "head": []}
    for pair in range(processes):
        with Stepper(base, case) as first, Stepper(head, case) as second:
            sides = {"base": first, "head": second}
            for number in range(rounds):
                for name in list(sides) if (number + pair) % 2 == 0 else reversed(list(sides)):
                    seconds[name].append(statistics.median(sides[name].step(STEPS)))
    return timing.ratio(seconds["head"], seconds["base"]), seconds


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__.splitlines()[0])
    parser.add_argument("base", help="a revision: main, HEAD~3, v0.1.0, …")
    parser.add_argument("--case", action="append", choices=CASES, help="default: those for this machine")
    parser.add_argument("--processes", type=int, default=2, help="pairs of processes (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="of each pair (default: %(default)s)")
    parser.add_argument("--plot", type=Path, default=PICTURE, metavar="FILE", help="default: %(default)s")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = options.case or (CASES[2:] if device.type == "cuda" else CASES[:2])
    try:
        with checked_out(options.base) as tree:
            found = {
                case: compare(tree, environment.ROOT, case, processes=options.processes, rounds=options.rounds)
                for case in chosen
            }
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    results = {
        case: {"ratio": dataclasses.asdict(ratio), "seconds": seconds} for case, (ratio, seconds) in found.items()
    }
    entry = environment.record("bench-compare", {"base": options.base, "cases": results}, device)
    rows = [_row(case, ratio, seconds) for case, (ratio, seconds) in found.items()]
    print(table(("case", f"{options.base}, ms", "working tree, ms", "ratio", "95 % confidence", ""), rows))
    bars = [(case, ratio, "ours") for case, (ratio, _) in found.items()]
    changed = ", changed" if entry["dirty"] else ""
    title = f"The working tree (commit {str(entry['commit'])[:9]}{changed}) against {options.base}"
    print(drawing.ratios(options.plot, bars, title=title, label=f"time of a step, {options.base} = 1"))
    return 0


def _row(case: str, ratio: timing.Interval, seconds: dict[str, list[float]]) -> tuple[str, ...]:
    word = "slower" if ratio.low > 1 else "faster" if ratio.high < 1 else "no difference seen"
    base, head = (f"{1e3 * statistics.median(seconds[side]):.2f}" for side in ("base", "head"))
    return case, base, head, f"{ratio.median:.3f}", f"{ratio.low:.3f}–{ratio.high:.3f}", word


def _git(*arguments: str) -> str:
    child = subprocess.run(
        ["git", *arguments], cwd=environment.ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    if child.returncode:
        raise ValueError(f"git {' '.join(arguments)}: {child.stderr.strip()}")
    return child.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
