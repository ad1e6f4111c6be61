"""Which GPU can run what: the cases compiled for each described device, and a table of it for the docs.

    python -m benchmarks.numerics.support [--only rtx3060] [--check | --accept]

``expected/gpu-support.csv`` holds, for each device, which cases compile to its machine code, or why one does not. The
table in ``docs/gpu-support.md`` is made of that and of what recipes and attention backends state that they need.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence

from benchmarks import ROOT, gate
from benchmarks.codegen.report import CodegenError, Report
from benchmarks.codegen.run import ask
from benchmarks.numerics.cases import CASES, Case
from cogx_fast.measure.devices import DEVICES, Device

EXPECTED = ROOT / "benchmarks" / "expected" / "gpu-support.csv"
DOCS = ROOT / "docs" / "gpu-support.md"
COMPILES = "compiles"
UNKNOWN = "not compiled yet"
SHOWN = ("a100", "rtx3060", "rtx4090", "h100", "b200")
"""In the table, by age."""

RECIPES = {
    "none (bf16)": "5b/block/bf16", "`int8-weight-only`": "5b/int8-weight-only/bf16",
    "`int8-dynamic`": "5b/int8-dynamic/bf16", "`fp8-weight-only`": "5b/fp8-weight-only/bf16",
    "`fp8-dynamic`": "5b/fp8-dynamic/bf16", "`fp8-dynamic-tensor`": "5b/fp8-dynamic-tensor/bf16",
}  # fmt: skip
"""The table's rows, and the case behind each."""
ATTENTION = {
    "`flex`": "5b/flex/bf16", "`flex` with a mask": "5b/masked/bf16", "an attention plan": "5b/sparse/bf16",
}  # fmt: skip
"""Attention that is generated code."""
COMPILED = (*RECIPES.values(), *ATTENTION.values(), "1.5-5b-i2v/begin/bf16", "5b/head/bf16")

Outcomes = Mapping[str, Mapping[str, str]]
"""By device and case: ``COMPILES``, or why not."""


def outcomes(devices: Sequence[str] = SHOWN) -> dict[str, dict[str, str]]:
    """Compile the cases for devices, to machine code.

    Raises:
        CodegenError: nothing can be compiled here.
    """
    found: dict[str, dict[str, str]] = {}
    for name in devices:
        device = DEVICES[name]
        able = [case for case in COMPILED if _unmet(CASES[case], device) is None]
        answers = ask([CASES[case].codegen_case(device) for case in able], name)
        words = {case: _words(answer) for case, answer in zip(able, answers, strict=True)}
        found[name] = {case: words.get(case) or _unmet(CASES[case], device) or "" for case in COMPILED}
    return found


def _words(answer: Report | str) -> str:
    return COMPILES if isinstance(answer, Report) else answer.strip().splitlines()[0][:200]


def _unmet(case: Case, device: Device) -> str | None:
    """Why the recipe says that it cannot run there."""
    from quant.schemes import SCHEMES

    needed = SCHEMES[case.recipe].requires.compute_capability if case.recipe else None
    if needed is None or device.capability >= tuple(map(int, needed.split("."))):
        return None
    return f"needs compute capability {needed}"


def recorded() -> dict[str, dict[str, str]]:
    """The outcomes of the table."""
    found: dict[str, dict[str, str]] = {}
    for row in gate.read(EXPECTED).values():
        if row.case != gate.VERSIONS:
            found.setdefault(row.case, {})[row.metric] = row.value
    return found


def accept(found: Outcomes) -> None:
    """Record outcomes and write the docs; other devices keep theirs."""
    from benchmarks.codegen.worker import versions

    before = recorded() if EXPECTED.is_file() else {}
    merged = {name: {**before, **found}[name] for name in SHOWN if name in {**before, **found}}
    gate.write(EXPECTED, versions(), gate.rows(merged, {}))
    DOCS.parent.mkdir(exist_ok=True)
    DOCS.write_text(markdown(merged), encoding="utf-8")


def markdown(found: Outcomes) -> str:
    """The page for the docs."""
    reasons: list[str] = []
    lines = [
        "# What each GPU can run",
        "",
        "Made by `python -m benchmarks.numerics.support --accept`: blocks of CogVideoX-5b compiled to the machine code",
        "of each GPU, without one, and what recipes and attention backends need. Nothing here was run on these GPUs;",
        "that the generated code computes the right numbers is what `make gpu-numerics` checks.",
        "",
        *_table("Recipe", {row: _compiled(found, case, reasons) for row, case in RECIPES.items()}),
        "",
        *_table("Attention", {
            **{row: _compiled(found, case, reasons) for row, case in ATTENTION.items()},
            **{f"`{name}`": _stated(name) for name in _library_backends()},
        }),
        "",
        "- +: needs an optional package, which the error names.",
        *([f"- –: {UNKNOWN}; `--only` takes one device."] if any(name not in found for name in SHOWN) else []),
        *(f"- ({number}): {reason}." for number, reason in enumerate(reasons, start=1)),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _table(title: str, rows: Mapping[str, Sequence[str]]) -> list[str]:
    names = [f"{DEVICES[name].name.removeprefix('NVIDIA ')} ({_capability(DEVICES[name])})" for name in SHOWN]
    lines = [f"| {title} | " + " | ".join(names) + " |", "|---" * (1 + len(SHOWN)) + "|"]
    return [*lines, *(f"| {row} | " + " | ".join(cells) + " |" for row, cells in rows.items())]


def _capability(device: Device) -> str:
    return ".".join(map(str, device.capability))


def _compiled(found: Outcomes, case: str, reasons: list[str]) -> list[str]:
    cells = []
    for name in SHOWN:
        words = _unmet(CASES[case], DEVICES[name]) or found.get(name, {}).get(case, UNKNOWN)
        if words in (COMPILES, UNKNOWN):
            cells.append("yes" if words == COMPILES else "–")
            continue
        if words not in reasons:
            reasons.append(words)
        cells.append(f"no ({reasons.index(words) + 1})")
    return cells


def _library_backends() -> list[str]:
    from cogx_fast.attention.backends import BACKENDS

    return [name for name in BACKENDS if name != "flex"]


def _stated(name: str) -> list[str]:
    """What the backend says of each device."""
    from cogx_fast.attention.backends import BACKENDS

    backend = BACKENDS[name]
    able = "yes +" if backend.module else "yes"
    return [
        able if backend.capabilities is None or DEVICES[device].capability[0] in backend.capabilities else "no"
        for device in SHOWN
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.numerics.support", description=__doc__)
    parser.add_argument("--only", choices=SHOWN, help="only this device")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="fail if anything differs from the recorded outcomes")
    action.add_argument("--accept", action="store_true", help="record the outcomes and write the docs")
    options = parser.parse_args(arguments)
    try:
        found = outcomes([options.only] if options.only else SHOWN)
    except CodegenError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, cases in found.items():
        for case, words in cases.items():
            print(f"{name:8} {case:28} {words}")
    if options.accept:
        accept(found)
    before = recorded() if options.check else {}
    changed = {name for name in before if name in found and before[name] != found[name]}
    if changed:
        print(f"differs from what is recorded: {', '.join(sorted(changed))}", file=sys.stderr)
    return int(bool(changed))


if __name__ == "__main__":
    sys.exit(main())
