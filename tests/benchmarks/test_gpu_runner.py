"""The GPU gate's commands on the CPU: a session, several ranks, the clock, what crashes, and its wheels."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gate
from benchmarks.environment import ROOT
from benchmarks.gpu import __main__ as runner
from benchmarks.gpu import budget, ranks, table, wheels
from benchmarks.gpu.cases import Case
from tests.conftest import run_cli

ONLY = r"--only=tiny/attention/(sdpa|sdpa-cudnn|flex-default)$"


@dataclasses.dataclass(frozen=True)
class Ran:
    text: str
    out: Path


def _session(out: Path) -> Ran:
    """The first part of a session on a GPU machine, which is a minute here."""
    arguments = f"--device=cpu --quick --baselines={out / 'baselines'} {ONLY}"
    environment = {**os.environ, "PYTHON": sys.executable, "SECONDS_A_PART": "250", "GATE": arguments}
    command = ["bash", str(ROOT / "benchmarks" / "gpu" / "session.sh"), "1", str(out)]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert child.returncode == 0, child.stderr
    return Ran(child.stdout, out)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return _session(tmp_path_factory.mktemp("session"))


def test_a_session_measures_records_and_reports(ran: Ran) -> None:
    lines = ran.text.splitlines()
    assert any(line.startswith("tiny/attention/sdpa ") for line in lines)
    assert f"no baseline yet: recorded in {ran.out / 'baselines' / 'cpu.csv'} (commit it): tiny/attention/sdpa" in lines
    assert "UNSUPPORTED here: tiny/attention/sdpa-cudnn, tiny/attention/flex-default" in lines
    assert "THE TIMES MEAN NOTHING" in ran.text  # nobody shall take them for a result
    stored = json.loads((ran.out / "tiny-attention.json").read_text())["benchmarks"][0]
    found = stored["extra_info"]["found"]
    assert stored["stats"]["median"] == pytest.approx(found["notes"]["seconds"], rel=1e-3)  # what was timed in turns
    ceilings = set(json.loads((ran.out / "ceilings.json").read_text()))
    assert ceilings | {"fp8"} == {"bf16", "fp8", "int8", "bandwidth"}  # not every CPU has fp8 products
    roofline = ("roofline", "--preset", "5b", "--device", "h100", "--ceilings", ran.out / "ceilings.json")
    assert "measured" in run_cli(*roofline).out
    assert "./README.md" in lines[-1]
    assert table.README.read_text() == table.current(table.README)  # nothing of the CPU came into it


def test_where_there_are_several_gpus_each_mesh_is_timed_beside_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    arguments = ["--device=cpu", "--quick", "--only=^ranks$", f"--out={tmp_path}", f"--baselines={tmp_path}"]
    assert runner.main(arguments) == 0
    rows = gate.read(tmp_path / "cpu.csv")
    assert {case for case, _ in rows} == {
        gate.VERSIONS, "tiny/ranks/block/1x2", "tiny/ranks/block/1x2-sharded",
        "tiny/ranks/block/2x1", "tiny/ranks/decode/2"
    }  # fmt: skip
    assert all(float(rows[case, "error"].value) <= ranks.LIMIT for case, metric in rows if metric == "speedup")
    better = gate.Row("tiny/ranks/decode/2", "speedup", "99.0", "0.05")
    text = (tmp_path / "cpu.csv").read_text().replace(str(rows["tiny/ranks/decode/2", "speedup"]), str(better))
    (tmp_path / "cpu.csv").write_text(text)
    capsys.readouterr()
    assert runner.main([*arguments, "--resume"]) == 1  # judges what the first run has left
    assert "REGRESSION: tiny/ranks/decode/2 speedup: 99.0 -> " in capsys.readouterr().out
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert runner.main(arguments) == 1
    assert "FAILED: 2 ranks: status 1" in capsys.readouterr().out


def test_it_goes_on_where_it_stopped(ran: Ran) -> None:
    before = (ran.out / "ledger.jsonl").read_text()
    again = _session(ran.out)
    assert "begun" not in (ran.out / "ledger.jsonl").read_text().removeprefix(before)
    assert any(line.startswith("tiny/attention/sdpa ") for line in again.text.splitlines())


def test_one_command_is_red_where_the_table_says_better(
    ran: Ran, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(ran.out / "cache"))
    case = Case(model="tiny", part="attention", recipe="sdpa")
    row = gate.read(ran.out / "baselines" / "cpu.csv")[str(case), "launches"]
    fewer = dataclasses.replace(row, value=str(int(row.value) - 1))
    text = (ran.out / "baselines" / "cpu.csv").read_text()
    (tmp_path / "cpu.csv").write_text(text.replace(str(row), str(fewer)))
    arguments = ["--device=cpu", "--quick", f"--baselines={tmp_path}", f"--out={tmp_path / 'out'}", f"--only={case}$"]
    assert runner.main(arguments) == 1
    assert f"REGRESSION: {case} launches: {fewer.value} -> {row.value}" in capsys.readouterr().out


def test_without_time_it_names_what_it_did_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))  # else the command sets it for good
    assert runner.main(["--device=cpu", "--quick", f"--out={tmp_path}", ONLY, "--budget=1"]) == 0
    names = "tiny/attention/sdpa, tiny/attention/sdpa-cudnn, tiny/attention/flex-default"
    assert f"NO TIME LEFT for 3: {names}" in capsys.readouterr().out


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runner.main([]) == 2
    assert "--device cpu --quick" in capsys.readouterr().err


def test_what_crashes_hangs_or_spoils_the_process_costs_only_itself(tmp_path: Path) -> None:
    file, ledger = tmp_path / "test_planted.py", tmp_path / "ledger.jsonl"
    file.write_text(
        "import os, time\n"
        "def test_good(): pass\n"
        "def test_crashing(): os._exit(3)\n"
        "def test_failing(): raise ValueError('planted')\n"
        "def test_spoiling(): raise RuntimeError('CUDA error: an illegal memory access was encountered')\n"
        "def test_hanging(): time.sleep(600)\n"
        "def test_after(): pass\n"
    )
    words = [str(file), f"--confcutdir={tmp_path}"]
    budget.run(words, seconds=250, ledger=ledger, least=1, limit=5)
    found = {line["test"].rpartition("_")[2]: line["outcome"] for line in budget.ended(ledger)}
    assert found == {"good": "passed", "crashing": "crashed", "failing": "failed", "spoiling": "failed",
                     "hanging": "timeout", "after": "passed"}  # fmt: skip
    assert not budget.not_run(ledger)
    assert any("ValueError: planted" in line for line in budget.summary(ledger))
    before = ledger.read_text()
    budget.run(words, seconds=60, ledger=ledger, least=1, limit=5)
    assert "begun" not in ledger.read_text().removeprefix(before)


def test_what_the_end_of_the_time_cut_short_is_begun_again(tmp_path: Path) -> None:
    file, ledger = tmp_path / "test_planted.py", tmp_path / "ledger.jsonl"
    file.write_text("import time\ndef test_one(): pass\ndef test_long(): time.sleep(600)\ndef test_last(): pass\n")
    words = [str(file), f"--confcutdir={tmp_path}", "--first", f"{file.name}::test_last"]
    budget.run(words, seconds=12, ledger=ledger, least=1, limit=100)
    order = [line["begun"].rpartition("_")[2] for line in budget.read(ledger) if "begun" in line]
    assert order == ["last", "one", "long"]
    (cut,) = budget.not_run(ledger)
    assert cut.endswith("test_long")
    assert budget.summary(ledger) == [f"NO TIME LEFT for 1: {cut}", "2 ended, 0 of them badly"]


@pytest.mark.parametrize(("workflow", "command"), [("ci", ".ci/run"), ("gpu", "make bench-gpu")])
def test_workflows_run_what_runs_here(workflow: str, command: str) -> None:
    yaml = pytest.importorskip("yaml")
    (job,) = yaml.safe_load((ROOT / ".github" / "workflows" / f"{workflow}.yml").read_text())["jobs"].values()
    runs = [step["run"] for step in job["steps"] if "run" in step]
    assert [run.partition(" ARGS=")[0] for run in runs] == [command]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100
    assert "\nbench-gpu: " in (ROOT / "Makefile").read_text()


# --------------------------------------------------------------------------------------------------------------- wheels


def test_wheels_of_what_is_missing_and_of_no_more() -> None:
    versions = ("Diff_Users-1.0", "torch-2.0", "old_thing-2.0", "pillow-3.0", "numpy-4.0")
    files = [f"{version}-py3-none-any.whl" for version in versions]
    present = {"old-thing": "1.0", "Pillow": "", "numpy": "4.0"}
    assert wheels.missing(files, present) == ["Diff_Users-1.0-py3-none-any.whl", "old_thing-2.0-py3-none-any.whl"]


def test_pieces_are_bounded() -> None:
    assert wheels.pieces({"a": 50, "b": 30, "c": 20, "d": 10}, 60) == [["a", "d"], ["b", "c"]]
    with pytest.raises(ValueError, match="more than a piece"):
        wheels.pieces({"a": 61}, 60)


def test_the_tested_versions_are_fetched() -> None:
    versions = wheels.constraints((ROOT / "constraints.txt").read_text(), "3.12")
    assert versions["diffusers"] == "0.42.1"
    assert wheels.constraints((ROOT / "constraints.txt").read_text(), "3.10")["diffusers"] == "0.41.0"
