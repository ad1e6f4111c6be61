"""Run the gate within a budget (see the package's docstring).

python -m benchmarks.gpu [--budget 3600] [--out DIR] [--only REGEX] [--resume] [--accept] [--device cpu --quick]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import environment
from benchmarks.gpu import budget, ranks, report, suite
from benchmarks.gpu.cases import plan

OUT = environment.ROOT / "out" / "gpu"
TEST = "benchmarks/gpu/bench_gpu.py::test_case[{}]"


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("error: torch sees no GPU here: --device cpu --quick tries the gate itself", file=sys.stderr)
        return 2
    chosen = [case for case in plan(quick=options.quick) if re.search(options.only, str(case))]
    has_ranks = torch.cuda.device_count() > 1 and re.search(options.only, "ranks") is not None
    if not chosen and not has_ranks:
        print(f"error: no case matches {options.only!r}", file=sys.stderr)
        return 2
    out = options.out.absolute()
    ledger = out / "ledger.jsonl"
    if ledger.is_file() and not options.resume:
        ledger.rename(ledger.with_suffix(f".{time.strftime('%Y%m%dT%H%M%S')}.jsonl"))
    out.mkdir(parents=True, exist_ok=True)
    with ledger.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"planned": [TEST.format(case) for case in chosen]}) + "\n")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(out / "cache"))  # what is begun again compiles from there
    passed_on = [f"--device={options.device}", f"--baselines={options.baselines.absolute()}", "--disable-warnings",
                 *(["--quick"] if options.quick else []), *(["--accept"] if options.accept else [])]  # fmt: skip
    end = time.monotonic() + options.budget
    red = has_ranks and ranks.main([
        f"--budget={options.budget / 2}", f"--out={out}", f"--baselines={options.baselines.absolute()}",
        f"--device={options.device}", *(["--quick"] * options.quick), *(["--accept"] * options.accept),
        *(["--resume"] * options.resume),
    ])  # fmt: skip
    for (model, part), cases in itertools.groupby(chosen, lambda case: (case.model, case.part)):
        tests = [TEST.format(case) for case in cases]
        tables = [f"--benchmark-json={out / f'{model}-{part}.json'}", "--benchmark-columns=median,iqr,rounds"]
        budget.run([*tests, *passed_on, *tables, *options.argument], seconds=end - time.monotonic(), ledger=ledger,
                   least=2 if options.quick else budget.LEAST_SECONDS, limit=options.limit)  # fmt: skip
    print("\n".join(report.write(ledger, chosen, out)))
    return int(red or any(line["outcome"] in budget.FAILED for line in budget.ended(ledger)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=3600, help="seconds for everything (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=600, help="seconds for a case (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="where results go (default: out/gpu)")
    parser.add_argument("--baselines", type=Path, default=suite.EXPECTED, metavar="DIR", help="the tables' folder")
    parser.add_argument("--only", default="", metavar="REGEX", help="cases whose name it finds")
    parser.add_argument("--resume", action="store_true", help="go on where the last run in --out stopped")
    parser.add_argument("--accept", action="store_true", help="record what is measured, and hold nothing against it")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="toy sizes: every line runs, the times mean nothing")
    parser.add_argument("--argument", action="append", default=[], help="one for pytest; again for more")
    return parser


if __name__ == "__main__":
    sys.exit(main())
