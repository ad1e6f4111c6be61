"""The process that compiles: cases as JSON on standard input, their reports as JSON in the file named first.

    python -m benchmarks.codegen.worker OUT < request.json

The request holds ``device`` (a short name), ``real`` and ``cases``. Use ``run.report``, which starts this.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import re
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.codegen import inductor, resources, shim
from benchmarks.codegen.cases import Case
from benchmarks.codegen.report import Candidate, CodegenError, Kind, Launch, Report
from cogx_fast.measure.devices import Device, get_device
from cogx_fast.measure.dtypes import default_dtype
from cogx_fast.measure.explain import traffic

_CALL = re.compile(r"^\s+(?:\w+ = )?(?:(triton_\w+)\.run|extern_kernels\.(\w+)|torch\.ops\.(\w+\.\w+)\.\w+)\(", re.M)
_KINDS: dict[str, Kind] = {"poi": "pointwise", "red": "reduction", "per": "persistent", "tem": "template"}


def main(request: Mapping[str, Any], out: Path) -> None:
    device = get_device(request["device"])
    if request["real"]:
        _check_real(device)
    else:
        if torch.version.cuda is None:
            ctypes.CDLL(str(shim.guard()))
        inductor.describe(device)
    answers: list[dict[str, Any]] = []
    for item in request["cases"]:
        case = Case(**item)
        try:
            answers.append({"report": compile_case(case, request["device"], real=request["real"]).to_dict()})
        except Exception as error:  # noqa: BLE001 - whatever a case does, the others still run, and its caller is told
            answers.append({"error": f"{type(error).__name__}: {error}", "details": traceback.format_exc()})
    out.write_text(json.dumps(answers))


def _check_real(device: Device) -> None:
    if not torch.cuda.is_available():
        raise CodegenError("real=True, but torch sees no GPU: leave it out to compile for a described one")
    if torch.cuda.get_device_name() != device.name:
        raise CodegenError(f"real=True for a {device.name}, but this machine has a {torch.cuda.get_device_name()}")


def compile_case(case: Case, device: str, *, real: bool) -> Report:
    """The case's report, in a process that is ready for it.

    Raises:
        CodegenError: the report would not be true.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    if not real:
        inductor.state_sdpa(case.sdpa)
    fake = contextlib.nullcontext() if real else FakeTensorMode()
    with fake, default_dtype(getattr(torch, case.dtype)), torch.no_grad():
        with torch.device("cuda"):
            module, arguments = case.make()
        start = time.perf_counter()
        capture = inductor.compile_only(module, arguments, traffic.count, case.options)
        seconds = time.perf_counter() - start
    if len(capture.graphs) != 1:
        raise CodegenError(f"{case.name} made {len(capture.graphs)} graphs, expected 1")
    report = Report(
        case=case.name,
        device=device,
        layers=case.layers,
        versions=versions(),
        real=real,
        launches=_launches(*capture.graphs[0]),
        graphs=len(capture.graphs),
        inductor_bytes=capture.inductor_bytes,
        seconds=round(seconds, 2),
        source=inductor.hash_of_source(capture.graphs[0][0]),
    )
    check(report, sdpa_calls=capture.sdpa_calls)
    return report


def check(report: Report, *, sdpa_calls: int) -> None:
    """Refuse a report that has lost something on the way.

    Raises:
        CodegenError: what it lost.
    """
    library = sum(launch.attention and launch.kind == "extern" for launch in report.launches)
    if library != sdpa_calls:
        raise CodegenError(
            f"{report.case} calls scaled_dot_product_attention {sdpa_calls} times, but its code {library} attention "
            "kernels: the others fell apart into products and a softmax"
        )
    if report.inductor_bytes <= 0 or report.bytes <= 0:
        raise CodegenError(f"{report.case}: Inductor counted {report.inductor_bytes} bytes and we {report.bytes}")
    for launch in report.triton:
        if not launch.candidates or not launch.ptx:
            raise CodegenError(f"{report.case}: {launch.name} was generated but not compiled")


def versions() -> dict[str, str]:
    import triton

    return {
        "torch": torch.__version__.partition("+")[0],
        "triton": triton.__version__,
        "ptxas": resources.ptxas_version(),
    }


def _launches(source: str, module: Any, works: list[traffic.Work]) -> tuple[Launch, ...]:
    """The generated code's calls in order, each with its work and machine code."""
    calls = [match.groups() for match in _CALL.finditer(source, source.index("def call("))]
    is_library = [generated is None for generated, _, _ in calls]
    if is_library != [work.is_library for work in works]:
        raise CodegenError(
            f"the code makes {len(calls)} calls, the schedule has {len(works)}: they cannot be told apart "
            f"({[next(filter(None, call)) for call in calls]})"
        )
    launches = []
    for (generated, extern, operator), work in zip(calls, works, strict=True):
        counted: dict[str, Any] = {
            "read_bytes": work.read_bytes, "written_bytes": work.written_bytes, "flops": work.flops,
            "products": work.products, "exponentials": work.exponentials, "attention": work.is_attention,
        }  # fmt: skip
        if generated is None:
            launches.append(Launch(name=extern or operator, kind="extern", **counted))
        else:
            ptx, candidates = _compiled(generated, getattr(module, generated))
            kind = _KINDS.get(generated.split("_")[1])
            if kind is None:
                raise CodegenError(f"{generated} is of a kind that is not known here: add it to _KINDS")
            launches.append(Launch(name=generated, kind=kind, ptx=ptx, candidates=candidates, **counted))
    return tuple(launches)


def _compiled(name: str, autotuner: Any) -> tuple[str, tuple[Candidate, ...]]:
    candidates, texts = [], []
    for result, launcher in zip(autotuner.compile_results, autotuner.launchers, strict=True):
        config = launcher.config
        candidates.append(
            Candidate(
                config={**config.kwargs, "num_warps": config.num_warps, "num_stages": config.num_stages},
                registers=launcher.n_regs,
                local_bytes=4 * launcher.n_spills,
                shared_bytes=launcher.shared,
            )
        )
        texts.append(result.kernel.asm["ptx"])
    return resources.hash_of_ptx(texts, name) if texts else "", tuple(candidates)


if __name__ == "__main__":
    main(json.load(sys.stdin), Path(sys.argv[1]))
