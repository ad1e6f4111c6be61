"""The process that runs generated code: a request as JSON on standard input, the answer in the file named first.

    python -m benchmarks.numerics.worker OUT < request.json

The request holds ``device`` (a short name) and either ``cases`` or ``faults``, by name. Use ``run``, which starts this.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.codegen import inductor, shim
from cogx_fast.measure.devices import Device, get_device


def main(request: Mapping[str, Any], out: Path) -> None:
    device = get_device(request["device"])
    if torch.version.cuda is None:
        ctypes.CDLL(str(shim.guard()))
    inductor.describe(device)
    torch.set_num_threads(1)  # the same sums on every machine of a kind
    from benchmarks.numerics import interpreter, kernels

    interpreter.install()
    kernels.install()
    answer = _measured(request["cases"], device) if "cases" in request else _planted(request["faults"], device)
    out.write_text(json.dumps(answer))


def _measured(names: list[str], device: Device) -> list[dict[str, Any]]:
    from benchmarks.numerics.cases import CASES
    from benchmarks.numerics.measure import measure

    answers: list[dict[str, Any]] = []
    for name in names:
        try:
            answers.append({"results": [result.to_dict() for result in measure(CASES[name], device)]})
        except Exception as error:  # noqa: BLE001 - whatever a case does, the others still run, and its caller is told
            answers.append({"error": _words(error), "details": traceback.format_exc()})
        print(name, file=sys.stderr, flush=True)
    return answers


def _planted(names: list[str], device: Device) -> list[dict[str, Any]]:
    from benchmarks.numerics.faults import FAULTS, plant

    return [dataclasses.asdict(finding) for finding in plant([FAULTS[name] for name in names], device)]


def _words(error: BaseException) -> str:
    """The first cause's, which dynamo and the interpreter wrap."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    main(json.load(sys.stdin), Path(sys.argv[1]))
