"""Reports for people: one table, ours beside diffusers', and one plot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.codegen.report import Launch, Report
from cogx_fast.measure.devices import Device
from cogx_fast.terminal import table

PEER = "diffusers"
COLUMNS = (
    "case", "triton", "library", "GB", "× peer", "Inductor's GB", "TFLOP", "registers", "spilled bytes", "block ms*",
    "step s*", "compiled in s",
)  # fmt: skip


def text(found: Sequence[Report], device: Device) -> str:
    """The table."""
    peers = _peers(found)
    rows = [_row(report, device, peers.get(_model(report))) for report in found]
    versions = ", ".join(f"{name} {version}" for name, version in found[0].versions.items())
    where = "compiled for this machine's" if found[0].real else "generated for a described"
    notes = [
        f"One block, batch 2, {where} {device.name}; {versions}.",
        "Registers, spilled bytes: the neediest kernel, its best to its worst candidate. × peer: of diffusers' bytes.",
        "* A prediction, not a measurement: every launch at the device's stated ceilings of memory, products and",
        f"  exponentials; a step is the layers' blocks alone. {device.source}.",
    ]
    return "\n".join([table(COLUMNS, rows), "", *notes])


def _row(report: Report, device: Device, peer: Report | None) -> tuple[str, ...]:
    gated = report.metrics
    return (
        report.case,
        str(report.triton_launches),
        str(sum(report.extern_calls.values())),
        f"{report.bytes / 1e9:.2f}",
        f"{report.bytes / peer.bytes:.2f}" if peer else "-",
        f"{report.inductor_bytes / 1e9:.2f}",
        f"{report.flops / 1e12:.2f}",
        f"{gated['registers_best']}–{gated['registers_worst']}",
        f"{gated['spilled_bytes_best']}–{gated['spilled_bytes_worst']}",
        f"{1e3 * report.predicted_seconds(device):.2f}",
        f"{report.predicted_step_seconds(device):.3f}",
        f"{report.seconds:.1f}",
    )


def plot(found: Sequence[Report], device: Device, path: Path) -> str:
    """Draw bytes and predicted time of each case's block by kind of launch.

    Returns:
        What was done, in a sentence.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return "no plot: matplotlib is not installed (pip install 'cogx-fast[plot]')"
    figure = Figure(figsize=(11, 1.5 + 0.4 * len(found)), layout="constrained")
    bytes_axes, time_axes = figure.subplots(1, 2, sharey=True)
    names = [report.case for report in found]
    _stack(bytes_axes, names, [_by_part(report, lambda launch: launch.bytes / 1e9) for report in found])
    _stack(
        time_axes, names, [_by_part(report, lambda launch: 1e3 * launch.predicted_seconds(device)) for report in found]
    )
    bytes_axes.set(xlabel="gigabytes read and written by a block")
    time_axes.set(xlabel="predicted, not measured: ms of a block at the device's ceilings")
    bytes_axes.invert_yaxis()
    figure.suptitle(f"Code generated for {device.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.hashsalt": "codegen"}):  # the same drawing is the same file
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    return f"plot: {path}"


def _stack(axes: Any, names: list[str], parts: list[Mapping[str, float]]) -> None:
    keys = list(dict.fromkeys(key for part in parts for key in part))
    left = [0.0] * len(names)
    for key in keys:
        widths = [part.get(key, 0.0) for part in parts]
        axes.barh(names, widths, left=left, label=key)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.legend(fontsize="small")


def _by_part(report: Report, amount: Callable[[Launch], float]) -> dict[str, float]:
    found = {"library products": 0.0, "attention": 0.0, "generated kernels": 0.0}
    for launch in report.launches:
        kind = "library products" if launch.kind == "extern" else "generated kernels"
        found["attention" if launch.attention else kind] += amount(launch)
    return found


def _model(report: Report) -> str:
    return report.case.partition("/")[0]


def _peers(found: Sequence[Report]) -> dict[str, Report]:
    return {_model(report): report for report in found if f"/{PEER}/" in report.case}
