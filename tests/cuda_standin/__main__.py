"""``python -m tests.cuda_standin``: the tests on the stand-in device, a pytest process for each card (two for
that with the most tests), two at a time."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.standin.build import StandinError, build, environment
from benchmarks.standin.cards import get_card

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "out" / "standin"
DEVICES = 2
"""Of each card, so that there is a cuda:1."""
CARDS = ("h100", "rtx4090", "a100", "rtx3060", "rtx4060", "b200", "t4")
"""Those with the most to do first."""
HALVED = ("h100",)
"""Those whose files are shared by two processes: half of the whole suite is one card's."""

_OPTIONS = ("-q", "--show-capture=no", "-o", "timeout=1800")
"""A test compiles for a minute and more, and the machine may have other work."""
_NO_TESTS = 5
"""pytest's exit status where -k leaves a card none."""


def run_card(name: str, folder: Path, kernels: str, arguments: list[str]) -> int:
    """pytest on one card, or ``card-0``, half of its files; its output is printed when it is done.

    Args:
        name: the card's.
        folder: of the stand-in's libraries.
        kernels: Triton's cache, which all share: a kernel is compiled once for a compute capability.
        arguments: more of pytest's.
    """
    card, _, half = name.partition("-")
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="standin-") as caches:
        variables = {
            **os.environ,
            **environment(folder, get_card(card), DEVICES),
            "STANDIN_CARD": card,
            "STANDIN_HALF": half,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor",
            "TRITON_CACHE_DIR": kernels,
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, "-m", "pytest", "tests/cuda_standin", *_OPTIONS, *arguments]
        log = OUT / f"{name}.log"  # to look at while it runs
        with log.open("w") as output:
            done = subprocess.run(
                command, cwd=ROOT, env=variables, stdout=output, stderr=subprocess.STDOUT, check=False
            )
    print(f"== {name}, {time.monotonic() - start:.0f} s\n{log.read_text()}", flush=True)
    return 0 if done.returncode == _NO_TESTS else done.returncode


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.cuda_standin", description=__doc__)
    parser.add_argument("--card", action="append", help=f"one of {', '.join(CARDS)}; again for another; all without")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    options, rest = parser.parse_known_args(arguments)
    try:
        folder = build(OUT)
    except StandinError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    cards = options.card or CARDS
    names = [name for card in cards for name in ([f"{card}-0", f"{card}-1"] if card in HALVED else [card])]
    with tempfile.TemporaryDirectory(prefix="standin-triton-") as kernels, ThreadPoolExecutor(options.jobs) as pool:
        statuses = list(pool.map(lambda name: run_card(name, folder, kernels, rest), names))
    failed = [name for name, status in zip(names, statuses, strict=True) if status]
    print(f"failed on {', '.join(failed)}" if failed else "every card passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
