"""Run the generated code of every case, and show, check or record its errors.

python -m benchmarks.codegen --numerics [--only 5b/] [--device h100] [--check | --accept | --faults]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import gate
from benchmarks.codegen.report import CodegenError
from benchmarks.numerics import report, run
from benchmarks.numerics.cases import CASES, SHORT
from benchmarks.numerics.faults import FAULTS
from benchmarks.numerics.report import Result
from cogx_fast.measure.devices import DEVICES, get_device

EXPECTED = Path(__file__).resolve().parents[1] / "expected" / "numerics.csv"
RECORDED_DEVICE = "h100"


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    names = [name for name in (FAULTS if options.faults else CASES) if options.only in name]
    names = [name for name in names if not options.short or name in SHORT]
    if not names:
        print(f"nothing has {options.only!r} in its name", file=sys.stderr)
        return 2
    if (options.check or options.accept) and options.device != RECORDED_DEVICE:
        print(f"the table holds for the described {RECORDED_DEVICE} only", file=sys.stderr)
        return 2
    try:
        return _faults(names, options.device) if options.faults else _cases(names, options)
    except CodegenError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _cases(names: Sequence[str], options: argparse.Namespace) -> int:
    found = run.results(names, options.device)
    print(report.text(found))
    print(f"\nGenerated for a described {get_device(options.device).name}, run on this machine's CPU.")
    if options.accept:
        accept(found)
        return 0
    verdict = report.check(found, gate.read(EXPECTED) if options.check else {}, versions())
    if not options.check:
        verdict.missing, verdict.replacement = [], []
    print(verdict)
    return int(not verdict.passed)


def _faults(names: Sequence[str], device: str) -> int:
    found = run.findings(names, device)
    for name, words in found.items():
        print(f"{'found ' if words else 'MISSED'} {name}: {words}")
    return int(not all(found.values()))


def accept(found: Sequence[Result], expected: Path = EXPECTED) -> None:
    """Record results; other cases keep theirs, unless they were recorded with other versions or are no more."""
    order = [f"{name} {size}" for name, case in CASES.items() for size in sorted(map(str, case.sizes))]
    margins = {name: str(margin) for name, margin in report.MARGINS.items()}
    gate.record(expected, versions(), report.measured(found), report.notes(found), order=order, margins=margins)


def versions() -> dict[str, str]:
    """What the figures depend on."""
    import torch
    import triton

    return {"torch": torch.__version__.partition("+")[0], "triton": triton.__version__}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codegen --numerics", description=__doc__)
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases (or faults) with this in their name")
    parser.add_argument("--short", action="store_true", help="only those that the tests run")
    parser.add_argument("--device", default=RECORDED_DEVICE, choices=DEVICES, help="the described device (%(default)s)")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="hold the errors against the recorded table, too")
    action.add_argument("--accept", action="store_true", help="record what was found")
    action.add_argument("--faults", action="store_true", help="plant faults in the code: each must be found")
    return parser


if __name__ == "__main__":
    sys.exit(main())
