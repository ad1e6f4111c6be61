"""The timing gate fails on a slower path and on an upcast, and its judge in each of the ways that it should."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import cogx_fast
from benchmarks import check, compare, environment, gate, stepper
from benchmarks.stepper import CASES
from cogx_fast.measure.timing import Interval
from cogx_fast.model import layers
from tests.clock import work_for_time

CASE = "5b-small/fp32/eager"
ROUNDS = 2
HONEST = layers.FeedForward.forward
Table = dict[tuple[str, str], gate.Row]


def _work() -> dict[str, Any]:
    """The case with one block, which is enough to see."""
    work = check.cases()[CASE]
    return {CASE: dataclasses.replace(work, config=dataclasses.replace(work.config, num_layers=1))}


def _table(ratio: float, margin: str = "0.2") -> Table:
    held = [gate.Row(gate.VERSIONS, name, version) for name, version in check.versions().items()]
    return {(row.case, row.metric): row for row in [*held, gate.Row(CASE, "ratio", str(ratio), margin)]}


@pytest.fixture(scope="module")
def expected() -> Table:
    """What the honest model does."""
    with work_for_time():
        results = check.check(_work(), {}, rounds=ROUNDS)[1]
    return _table(round(results[CASE]["ratio"]["median"], 3))


def _three_times(self: Any, x: torch.Tensor) -> torch.Tensor:
    return (HONEST(self, x) + HONEST(self, x) + HONEST(self, x)) / 3


def _upcast(self: Any, x: torch.Tensor) -> torch.Tensor:
    """Of fp32 to fp64: twice the bytes (the code generated for a GPU shows bf16 to fp32: test_codegen)."""
    return HONEST(self.double(), x.double()).to(x.dtype)


@pytest.mark.parametrize("planted", [_three_times, _upcast])
def test_a_planted_regression_is_caught(planted: Any, expected: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers.FeedForward, "forward", planted)
    with work_for_time():
        verdict, results = check.check(_work(), expected, rounds=ROUNDS)
    assert not verdict.passed
    assert f"REGRESSION: {CASE} ratio" in str(verdict)
    assert results[CASE]["rounds"] == 2 * ROUNDS  # measured again before it counted
    assert f"  {CASE},ratio,{results[CASE]['ratio']['median']:.3f}".rstrip("0") in str(verdict)


def test_the_honest_model_passes(expected: Table) -> None:
    with work_for_time():
        verdict, _ = check.check(_work(), expected, rounds=ROUNDS)
    assert verdict.passed, str(verdict)


def test_what_is_faster_is_told_and_fails_nothing() -> None:
    verdict = check.judge(_table(1.0), {CASE: 0.7}, check.versions())
    assert verdict.passed
    assert str(verdict) == f"passed\nbetter (--accept records it): {CASE} ratio: 1.0 -> 0.7 (0.700 ×)"
    assert not verdict.replacement


@pytest.mark.parametrize(("ratio", "passed"), [(1.19, True), (1.21, False)])
def test_the_margin_is_the_limit(ratio: float, passed: bool) -> None:
    assert check.judge(_table(1.0), {CASE: ratio}, check.versions()).passed is passed


def test_a_case_without_a_row_and_a_row_without_a_case_fail() -> None:
    missing = check.judge(_table(1.0), {"5b-small/bf16/eager": 1.0}, check.versions())
    assert not missing.passed
    assert missing.replacement == [gate.Row("5b-small/bf16/eager", "ratio", "1.0", "0.2")]
    table = _table(1.0) | {("gone", "ratio"): gate.Row("gone", "ratio", "1", "0")}
    assert check.judge(table, {CASE: 1.0}, check.versions()).stale == ["gone,ratio,1,0 has no case"]


def test_another_machine_is_not_judged() -> None:
    verdict = check.judge(_table(1.0), {CASE: 9.0}, {**check.versions(), "processor": "abacus"})
    assert verdict.not_binding


def test_the_recorded_table_has_every_case_and_margins_that_can_fail() -> None:
    rows = gate.read(check.EXPECTED)
    assert {row.case for row in rows.values()} == {*check.cases(), gate.VERSIONS}
    assert all(0 < float(row.margin) <= 0.25 for row in rows.values() if row.case != gate.VERSIONS)


def test_accepting_records_and_keeps_margins(tmp_path: Path) -> None:
    path = tmp_path / "timing.csv"
    check.accept({CASE: {"ratio": {"median": 1.23456}}}, path)
    gate.write(path, check.versions(), [gate.Row(CASE, "ratio", "1.2", "0.1")])
    check.accept({CASE: {"ratio": {"median": 1.5}}}, path)
    assert gate.read(path)[CASE, "ratio"] == gate.Row(CASE, "ratio", "1.5", "0.1")


def test_the_history_says_what_with_and_where(tmp_path: Path) -> None:
    path = tmp_path / "new" / "history.jsonl"
    for number in (1, 2):
        environment.record("test", {"number": number}, torch.device("cpu"), path)
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert [entry["results"]["number"] for entry in entries] == [1, 2]
    assert {"commit", "dirty", "torch", "diffusers", "device", "gpu", "load", "time"} <= set(entries[0])


# -------------------------------------------------------------------------------------------------------- two revisions


def _tree(path: Path, milliseconds: int) -> Path:
    """A revision whose steps take that long."""
    (path / "cogx_fast").mkdir(parents=True)
    (path / "cogx_fast" / "__init__.py").write_text(f"MILLISECONDS = {milliseconds}\n")
    return path


def test_a_slower_revision_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stepper = tmp_path / "stepper.py"
    stepper.write_text(
        "import json, random, sys\nimport cogx_fast\nprint(json.dumps({'package': cogx_fast.__file__}), flush=True)\n"
        "for line in sys.stdin:\n"
        "    times = [cogx_fast.MILLISECONDS * random.uniform(0.9, 1.1) / 1e3 for _ in range(int(line))]\n"
        "    print(json.dumps(times), flush=True)\n"
    )
    monkeypatch.setattr(compare, "STEPPER", stepper)
    base, head = _tree(tmp_path / "base", 100), _tree(tmp_path / "head", 150)
    ratio, seconds = compare.compare(base, head, CASES[0], processes=2, rounds=5)
    assert len(seconds["base"]) == len(seconds["head"]) == 10
    assert ratio.low > 1.3
    assert compare._row("case", ratio, seconds)[-1] == "slower"
    with pytest.raises(RuntimeError, match="expected the package in"):
        compare.Stepper(tmp_path / "elsewhere", CASES[0])


def test_the_process_steps_the_package_on_its_path(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("2\n1\n"))
    threads = torch.get_num_threads()
    try:
        stepper.main(CASES[0])
    finally:
        torch.set_num_threads(threads)
    ready, two, one = map(json.loads, capsys.readouterr().out.splitlines())
    assert Path(ready["package"]) == Path(cogx_fast.__file__)
    assert (len(two), len(one)) == (2, 1)
    assert min(two + one) > 0


def test_a_base_is_checked_out_and_removed_again() -> None:
    with compare.checked_out("HEAD") as tree:
        assert (tree / "cogx_fast" / "__init__.py").is_file()
    assert not tree.exists()


def test_words_for_a_ratio_that_may_be_chance() -> None:
    seconds = {"base": [1.0], "head": [1.0]}
    assert compare._row("c", Interval(median=1.01, low=0.98, high=1.04), seconds)[-1] == "no difference seen"
    assert compare._row("c", Interval(median=0.9, low=0.85, high=0.95), seconds)[-1] == "faster"


def test_a_revision_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(["no-such-revision"]) == 2
    assert "no-such-revision" in capsys.readouterr().err
