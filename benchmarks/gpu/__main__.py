"""Run the battery (see the package's docstring).

python -m benchmarks.gpu [--budget 540] [--out DIR] [--models 5b,2b] [--only REGEX] [--full] [--device cpu --quick]
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment
from benchmarks.gpu import pool, report
from benchmarks.gpu.cases import MODELS, PLANTS, QUICK_MODEL, Case, plan
from cogx_fast.config import PRESETS

OUT = environment.ROOT / "out" / "gpu"
LEAST_SECONDS = 20
"""A case is not begun with less than this left of the budget."""
QUICK_LEAST_SECONDS = 2


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("error: torch sees no GPU here: use --device cpu --quick to try the battery itself", file=sys.stderr)
        return 2
    models = [QUICK_MODEL] if options.quick else options.models.split(",")
    unknown = [model for model in models if model not in PRESETS]
    if unknown:
        print(f"error: no models {unknown}: choose from {', '.join(PRESETS)}", file=sys.stderr)
        return 2
    chosen = [
        case
        for case in plan(models=models, quick=options.quick, full=options.full, plants=options.plant)
        if re.search(options.only, case.name)
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    results = carry_out(chosen, options.device, budget=options.budget, out=options.out, again=options.resume)
    for line in report.write(results, chosen, options.out):
        print(line)
    print(report.table_of(results, chosen))
    return 0 if any(result["status"] == "done" for result in results["cases"]) else 1


def carry_out(
    chosen: Sequence[Case], device: str, *, budget: float, out: Path, again: Path | None = None
) -> dict[str, Any]:
    """Run cases until the budget is spent; what is known is written after each.

    Args:
        chosen: in the order in which they run.
        device: "cuda" or "cpu".
        budget: seconds.
        out: where ``results.json`` goes.
        again: an earlier ``results.json``; what was done there is not done again.
    """
    begin = time.perf_counter()
    results: dict[str, Any] = {"environment": environment.snapshot(torch.device(device)), "cases": []}
    if again is not None:
        earlier = json.loads(again.read_text())
        results["earlier"] = earlier["environment"]
        results["cases"] = [case for case in earlier["cases"] if case["status"] != "no time"]
    done = {result["case"] for result in results["cases"]}
    for case in chosen:
        if case.name in done:
            continue
        left = budget - (time.perf_counter() - begin)
        if left < (QUICK_LEAST_SECONDS if case.quick else LEAST_SECONDS):
            results["cases"].append({"case": case.name, "status": "no time", "seconds": 0.0})
            continue
        print(f"{time.perf_counter() - begin:6.0f} s  {case.name} …", file=sys.stderr, flush=True)
        result = pool.run(case, device, limit=min(case.limit, left))
        print(f"          {result['status']} in {result['seconds']:.1f} s {result.get('error', '')}", file=sys.stderr)
        results["cases"].append(result)
        (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    results["seconds"] = time.perf_counter() - begin
    return results


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=540, help="seconds for everything (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="where results go (default: out/gpu)")
    parser.add_argument("--models", default=",".join(MODELS), help="in this order (default: %(default)s)")
    parser.add_argument("--only", default="", metavar="REGEX", help="cases whose name it finds")
    parser.add_argument("--full", action="store_true", help="all layers for compiled peers, too: minutes to compile")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="a results.json to go on from")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="toy sizes: every line runs, the times mean nothing")
    parser.add_argument("--plant", action="append", default=[], choices=PLANTS, help="a defect, to see it contained")
    return parser


if __name__ == "__main__":
    sys.exit(main())
