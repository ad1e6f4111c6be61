"""Generated GPU code run on the CPU: the instrument is right, the numbers hold, and planted faults are found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gate
from benchmarks.codegen import DEVICES, CodegenError, Report
from benchmarks.codegen import __main__ as codegen
from benchmarks.codegen.run import ROOT, ask
from benchmarks.numerics import __main__ as command
from benchmarks.numerics import report, run, support
from benchmarks.numerics.cases import CASES, SHORT
from benchmarks.numerics.faults import FAULTS
from benchmarks.numerics.report import Result

pytestmark = pytest.mark.timeout(1800)
H100 = DEVICES["h100"]
SHORT_FAULTS = [name for name, fault in FAULTS.items() if fault.case in ("5b/block/bf16", "5b/block/fp32")]
LONG_FAULTS = [name for name in FAULTS if name not in SHORT_FAULTS]

# ------------------------------------------------------------------------------------------------------- the instrument


@pytest.fixture(scope="module")
def interpreted(compiler: None) -> dict[str, Any]:
    """What the corrected interpreter makes of kernels whose results are known."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.interpreted"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


def test_values_are_rounded_as_by_torch(interpreted: dict[str, Any]) -> None:
    assert interpreted["rounds"] == {"bf16": True, "e4m3": True, "saturates": True}


def test_operations_give_what_torch_gives(interpreted: dict[str, Any]) -> None:
    differences = interpreted["computes"]
    assert differences.pop("int8 dot") == differences.pop("bf16 product") == differences.pop("maximum") == 0
    assert all(difference < 2e-5 for difference in differences.values()), differences


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("sound", None),
        ("in place", None),
        ("past the end", "copy, program 3: reads bytes 108 to 132 of a buffer of 128"),
        ("written twice", "writes what program 0 writes"),
        ("read and written", "program 1: writes what another program reads"),
    ],
)
def test_accesses_are_checked(interpreted: dict[str, Any], what: str, words: str | None) -> None:
    said = interpreted["memory"][what]
    assert (said == "") if words is None else (words in said)


# ---------------------------------------------------------------------------------------------------------- the numbers


@pytest.fixture(scope="module")
def short(compiler: None) -> list[Result]:
    return run.results(SHORT)


def test_the_numbers_hold(short: list[Result]) -> None:
    verdict = report.check(short, gate.read(command.EXPECTED), command.versions())
    assert verdict.passed, f"\n{verdict}"


def test_fp32_code_is_exact_to_fp32(short: list[Result]) -> None:
    exact = [result for result in short if report.is_exact(result.case)]
    assert len(exact) >= 4
    assert all(result.figures["error"] <= report.FP32_LIMIT for result in exact)


def test_one_graph_holds_for_every_size(short: list[Result]) -> None:
    symbolic = [result for result in short if result.case == "symbolic/block/bf16"]
    assert [result.size for result in symbolic] == ["B2 S200", "B1 S20", "B3 S212"]
    assert {result.graphs for result in symbolic} == {1}


def test_every_configuration_is_recorded_for_tiny_cases() -> None:
    recorded = gate.read(command.EXPECTED)
    tiny = [case for case in CASES.values() if case.every_candidate]
    assert [int(recorded[f"{case.name} {case.sizes[0]}", "candidates"].value) > 1 for case in tiny] == [True, True]


def test_the_gate_sees_the_same_code(short: list[Result]) -> None:
    name = "5b/fp8-dynamic/bf16"
    (answer,) = ask([CASES[name].codegen_case(H100)])
    assert isinstance(answer, Report), answer
    assert [answer.source] == [result.source for result in short if result.case == name]


@pytest.mark.slow
def test_the_numbers_hold_for_all_others(compiler: None) -> None:
    found = run.results([name for name in CASES if name not in SHORT])
    verdict = report.check(found, gate.read(command.EXPECTED), command.versions())
    assert verdict.passed, f"\n{verdict}"


def test_every_case_is_recorded() -> None:
    recorded = {row.case.partition(" ")[0] for row in gate.read(command.EXPECTED).values()}
    assert recorded == {gate.VERSIONS, *CASES}


# ------------------------------------------------------------------------------------------------------- planted faults


@pytest.fixture(scope="module")
def planted(compiler: None) -> dict[str, str]:
    return run.findings(SHORT_FAULTS)


@pytest.mark.parametrize("fault", SHORT_FAULTS)
def test_a_planted_fault_is_found(planted: dict[str, str], fault: str) -> None:
    assert planted[fault]


def test_faults_of_memory_are_found_as_such(planted: dict[str, str]) -> None:
    assert "of a buffer of" in planted["a row too many"]
    assert "what program" in planted["rows that overlap"]
    assert "error is inf" in planted["result not stored"]
    assert "was written" in planted["input written"]


@pytest.mark.slow
def test_every_other_planted_fault_is_found(compiler: None) -> None:
    found = run.findings(LONG_FAULTS)
    assert [name for name in LONG_FAULTS if not found[name]] == []


# ------------------------------------------------------------------------------------------------ verdicts and commands

FIGURES = {"error": 5e-3, "eager": 5e-3, "rounded": 2e-3}


def _result(case: str = "5b/block/bf16", **figures: float) -> Result:
    return Result(
        case=case, size="B2 S200", figures=FIGURES | figures, graphs=1, launches=4, library=5, candidates=1,
        source="0123456789abcdef", seconds=1.0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("case", "figures", "words"),
    [
        ("5b/block/bf16", {}, []),
        ("5b/block/bf16", {"error": 5.09e-3}, []),
        ("5b/block/bf16", {"error": 5.11e-3}, ["error is 5.110e-03, recorded is 5.000e-03"]),
        ("5b/block/bf16", {"error": 4.89e-3}, ["error is 4.890e-03, recorded is 5.000e-03"]),
        ("5b/block/bf16", {"rounded": 3.1e-3}, ["rounded is 3.100e-03, recorded is 2.000e-03"]),
        ("5b/block/bf16", {"rounded": 0.0}, []),
        ("5b/block/bf16", {"eager": 4.5e-3}, ["error is 5.000e-03, allowed is 4.950e-03"]),
        ("5b/block/bf16", {"error": float("nan")}, ["error is nan, allowed is 5.500e-03", "error is nan, recorded"]),
        ("5b/block/fp32", {"error": 5e-7, "rounded": 5e-7}, []),
        ("5b/block/fp32", {"error": 7e-7, "rounded": 5e-7}, ["error is 7.000e-07, allowed is 6.000e-07"]),
    ],
)
def test_a_result_is_judged(case: str, figures: dict[str, float], words: list[str]) -> None:
    found = report.wrong(case, FIGURES | figures, FIGURES)
    assert len(found) == len(words)
    assert all(said.startswith(expected) for said, expected in zip(found, words, strict=True))


def test_results_are_recorded_and_held(tmp_path: Path) -> None:
    table = tmp_path / "numerics.csv"
    command.accept([_result(), _result("2b/block/bf16")], table)
    command.accept([_result(error=5.2e-3)], table)
    recorded = gate.read(table)
    assert recorded["5b/block/bf16 B2 S200", "error"] == gate.Row("5b/block/bf16 B2 S200", "error", "0.0052", "0.02")
    assert recorded["2b/block/bf16 B2 S200", "error"].value == "0.005"
    assert report.check([_result(error=5.25e-3)], recorded, command.versions()).passed
    worse = report.check([_result(error=5.4e-3)], recorded, command.versions())
    assert len(worse.regressions) == 1
    assert report.check([_result(error=5.0e-3)], recorded, command.versions()).wins
    assert not report.check([_result(error=5.2e-3, rounded=1e-3)], recorded, command.versions()).wins
    assert report.check([_result("1.5-5b/block/bf16")], recorded, command.versions()).missing


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(command, "EXPECTED", tmp_path / "numerics.csv")
    monkeypatch.setattr(command.accept, "__defaults__", (tmp_path / "numerics.csv",))
    monkeypatch.setattr(run, "results", lambda names, device: asked.append((list(names), device)) or [_result()])
    monkeypatch.setattr(run, "findings", lambda names, device: dict.fromkeys(names, "wrong"))
    assert codegen.main(["--numerics", "--only", "5b/block/bf16", "--accept"]) == 0
    assert asked[-1] == ([name for name in CASES if "5b/block/bf16" in name], "h100")
    assert codegen.main(["--numerics", "--only", "5b/block/bf16", "--check"]) == 0
    monkeypatch.setattr(run, "results", lambda names, device: [_result(error=5.4e-3)])
    assert codegen.main(["--numerics", "--only", "5b/block/bf16", "--check"]) == 1
    assert "REGRESSION" in capsys.readouterr().out
    assert codegen.main(["--numerics", "--only", "nothing"]) == 2
    assert codegen.main(["--numerics", "--check", "--device", "a100"]) == 2
    assert codegen.main(["--numerics", "--faults"]) == 0
    monkeypatch.setattr(run, "findings", lambda names, device: dict.fromkeys(names, ""))
    assert codegen.main(["--numerics", "--faults"]) == 1


def test_a_case_that_cannot_be_run_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_ask", lambda request: [{"error": "ValueError: odd", "details": "Traceback"}])
    with pytest.raises(CodegenError, match="5b/block/bf16 on a100: ValueError: odd"):
        run.results(["5b/block/bf16"], "a100")


def test_a_fault_whose_code_is_another_by_now_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    stale = {"fault": "rotary sign", "case": "5b/block/bf16", "words": "", "stale": "'tmp47' is nowhere in it"}
    monkeypatch.setattr(run, "_ask", lambda request: [stale])
    with pytest.raises(CodegenError, match=r"rotary sign \(5b/block/bf16\): 'tmp47' is nowhere"):
        run.findings(["rotary sign"])


# ----------------------------------------------------------------------------------------------- which GPU can run what


def test_the_page_of_supported_gpus_is_up_to_date() -> None:
    found = support.recorded()
    assert found.keys() <= set(support.SHOWN)
    assert all(list(cases) == list(support.COMPILED) for cases in found.values())
    assert support.DOCS.read_text(encoding="utf-8") == support.markdown(found)


@pytest.mark.slow
@pytest.mark.parametrize("device", support.recorded())
def test_the_recorded_support_holds(compiler: None, device: str) -> None:
    assert support.outcomes([device])[device] == support.recorded()[device]
