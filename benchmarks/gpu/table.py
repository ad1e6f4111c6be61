"""What to expect on an H100 and what GPUs have shown, made from committed files (``python -m benchmarks.gpu.table``).

README has the rows that most look for, docs/measurements.md all.

A row whose case is in the device's table of the gate is measured, and says at which commit; every other row is
predicted, by the device's stated ceilings and the kernels and bytes counted in the generated code. Whatever the gate
has recorded, on any device, is a second table.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import ROOT, gate
from benchmarks.gpu import measure, suite
from benchmarks.gpu.cases import MODELS, RECIPES, SPARSE, Case
from benchmarks.marked import replaced
from cogx_fast.measure.devices import DEVICES, GIGA, TERA

README = ROOT / "README.md"
DOCS = ROOT / "docs" / "measurements.md"
IN_README = (("2b", "5b", "1.5-5b"), ("bf16", "fp8-dynamic", "radial"))
"""Models and recipes in README's."""
DEVICE = DEVICES["h100"]
COUNTED = ROOT / "benchmarks" / "expected" / "codegen.csv"
MEASURED = suite.EXPECTED / f"{DEVICE.name.replace(' ', '-')}.csv"

Table = Mapping[tuple[str, str], gate.Row]


def render(
    counted: Table, measured: Table, models: Sequence[str] = tuple(MODELS), recipes: Sequence[str] = tuple(RECIPES)
) -> str:
    """The table in Markdown.

    Args:
        counted: the gate's table of generated code.
        measured: the gate's table of the device; empty where it has not been measured.
        models, recipes: its rows.
    """
    rows = [_row(model, recipe, counted, measured) for model in models for recipe in recipes]
    header = (
        "model",
        "recipe",
        "a step, s",
        "× diffusers compiled",
        "a block: kernels, GB (× diffusers')",
        "the step is",
    )
    lines = [header, ("---",) * len(header), *rows]
    text = "\n".join(f"| {' | '.join(row)} |" for row in lines)
    return f"{text}\n\n{_sources(counted, measured)}\n"


def _row(model: str, recipe: str, counted: Table, measured: Table) -> tuple[str, ...]:
    case = Case(model=model, part="step", recipe=recipe)
    seconds, ratio, source = f"≥ {measure.floor_seconds(case, DEVICE):.3f}", "–", "predicted"
    if (str(case), "ratio") in measured:
        seconds, ratio = (measured[str(case), name].value for name in ("seconds", "ratio"))
        source = f"measured, {measured[str(case), 'commit'].value}"
    return model, f"`{recipe}`", seconds, ratio, _block(model, recipe, counted), source


def _block(model: str, recipe: str, counted: Table) -> str:
    """What one block's generated code was counted to do; image-to-video models have the blocks of their siblings."""
    sibling = model.removesuffix("-i2v")
    ours = f"{sibling}/ours/cudnn" + ("" if recipe == "bf16" else f"/{recipe}")
    if recipe == SPARSE or (ours, "bytes") not in counted:
        return "–"
    here, peer = (int(counted[name, "bytes"].value) for name in (ours, f"{sibling}/diffusers/cudnn"))
    kernels = sum(int(counted[ours, name].value) for name in ("triton_launches", "extern_calls"))
    return f"{kernels}, {here / GIGA:.2f} ({here / peer:.2f})"


def _sources(counted: Table, measured: Table) -> str:
    def versions(table: Table) -> str:
        return ", ".join(f"{row.metric} {row.value}" for row in table.values() if row.case == gate.VERSIONS)

    rates = ", ".join(f"{name} {getattr(DEVICE, name) / TERA:.0f}" for name in ("bf16", "fp8", "int8"))
    text = (
        "A step is one call with guidance (batch 2) at the model's own video size. Predicted: the least time that the "
        f"stated ceilings of {DEVICE.name} allow, which nothing reaches: {rates} TFLOP/s, "
        f"{DEVICE.bandwidth / GIGA:.0f} GB/s, {DEVICE.exponentials / TERA:.2f} T exponentials/s ({DEVICE.source}). "
        f"Kernels and bytes are counted in the code generated for it (`{COUNTED.relative_to(ROOT)}`: "
        f"{versions(counted)}). "
    )
    if measured:
        name = MEASURED.relative_to(ROOT)
        text += f"Measured: on {DEVICE.name} with {versions(measured)}, at the commit that is named (`{name}`)."
    else:
        text += "No step has been measured on such a device."
    return textwrap.fill(text, 120, break_on_hyphens=False)


def render_measured(tables: Mapping[str, Table]) -> str:
    """What the gate has recorded, by device; empty where it has recorded nothing."""
    header = ("measured on", "case", "ms", "diffusers compiled, ms", "ratio", "error (diffusers')", "with, at")
    rows = []
    for device, table in tables.items():
        versions = ", ".join(f"{row.metric} {row.value}" for row in table.values() if row.case == gate.VERSIONS)
        for case in dict.fromkeys(case for case, metric in table if metric == "ratio"):
            one = {metric: row.value for (name, metric), row in table.items() if name == case}
            times = (f"{1e3 * float(one[name]):.2f}" for name in ("seconds", "peer_seconds"))
            error = f"{float(one['error']):.1e}" + (f" ({float(one['peer_error']):.1e})" if "peer_error" in one else "")
            rows.append((device, f"`{case}`", *times, one["ratio"], error, f"{versions}, {one['commit']}"))
    if not rows:
        return ""
    note = (
        "Measured in turns in one process by `benchmarks/gpu`; the ratio is the one that is gated. A block is a model "
        "of one layer with guidance (batch 2) at the model's own video size, its embedding and its last norm included; "
        "attention alone is compared with SDPA's. The error is relative to the same in fp32."
    )
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines) + "\n\n" + textwrap.fill(note, 120) + "\n"


def current(file: Path) -> str:
    """README or docs/measurements.md with the table as the committed files make it.

    Raises:
        ValueError: it lacks the marks between which the table stands.
    """
    measured = gate.read(MEASURED) if MEASURED.is_file() else {}
    text = render(gate.read(COUNTED), measured, *(IN_README if file == README else ()))
    tables = {path.stem.replace("-", " "): gate.read(path) for path in sorted(suite.EXPECTED.glob("*.csv"))}
    text = "\n".join(part for part in (text, render_measured(tables)) if part)
    return replaced(file, "python -m benchmarks.gpu.table", text)


if __name__ == "__main__":
    for file in (README, DOCS):
        file.write_text(current(file), encoding="utf-8")
    sys.exit(0)
