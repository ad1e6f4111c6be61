"""Compile the cases, and show, check or record what they would run.

python -m benchmarks.codegen [--only 5b/] [--device h100] [--check | --accept] [--plot FILE] [--json FILE] [--real]
python -m benchmarks.codegen --numerics …    runs what is generated, on the CPU (benchmarks.numerics)
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import ROOT, gate
from benchmarks.codegen import table
from benchmarks.codegen.cases import CASES, cases
from benchmarks.codegen.report import CodegenError, Report
from benchmarks.codegen.run import reports
from cogx_fast.measure.devices import DEVICES, get_device

EXPECTED = ROOT / "benchmarks" / "expected" / "codegen.csv"
RESULTS = ROOT / "benchmarks" / "results"
GATED_DEVICE = "h100"


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--numerics" in arguments:
        from benchmarks.numerics.__main__ import main as numerics

        return numerics([argument for argument in arguments if argument != "--numerics"])
    options = _parser().parse_args(arguments)
    device = get_device(options.device)
    known = cases(device)
    chosen = [case for name, case in known.items() if options.only in name]
    if not chosen:
        print(f"no case has {options.only!r} in its name: {', '.join(known)}", file=sys.stderr)
        return 2
    if (options.check or options.accept) and (options.device != GATED_DEVICE or options.real):
        print(f"the table holds for the described {GATED_DEVICE} only", file=sys.stderr)
        return 2
    try:
        found = reports(chosen, options.device, real=options.real)
    except CodegenError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        options.json.write_text(json.dumps([report.to_dict() for report in found], indent=1) + "\n")
    if options.check:
        verdict = check(found)
        print(verdict)
        return int(not verdict.passed)
    if options.accept:
        accept(found)
    print(table.text(found, device))
    print(table.plot(found, device, options.plot or RESULTS / f"codegen-{options.device}.svg"))
    return 0


def check(found: Sequence[Report], expected: Path = EXPECTED) -> gate.Verdict:
    """Hold reports against the recorded ones."""
    recorded = gate.read(expected) if expected.is_file() else {}
    return gate.compare(recorded, _measured(found), _kernels(found), found[0].versions)


def accept(found: Sequence[Report], expected: Path = EXPECTED) -> None:
    """Record reports; other cases keep theirs, unless they were recorded with other versions."""
    gate.record(expected, found[0].versions, _measured(found), _kernels(found), order=CASES)


def _measured(found: Sequence[Report]) -> gate.Measured:
    return {report.case: report.metrics for report in found}


def _kernels(found: Sequence[Report]) -> gate.Measured:
    """Each launch's identity, which explains what changed."""
    return {
        report.case: {f"launch {number}": launch.identity for number, launch in enumerate(report.launches)}
        for report in found
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codegen", description=__doc__)
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases with this in their name")
    parser.add_argument("--device", default=GATED_DEVICE, choices=DEVICES, help="the described device (%(default)s)")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="fail if anything differs from the recorded table")
    action.add_argument("--accept", action="store_true", help="record what was found")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="where to draw the table (benchmarks/results/)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the whole reports there")
    parser.add_argument("--real", action="store_true", help="compile for this machine's GPU instead, to compare")
    return parser


if __name__ == "__main__":
    sys.exit(main())
