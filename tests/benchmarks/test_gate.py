"""The table of expected results can fail, in each of the ways that it should."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import gate

VERSIONS = {"torch": "1.0"}
MEASURED = {"a": {"launches": 5, "bytes": 1000, "attention": "cudnn"}}
NOTES = {"a": {"launch 0": "norm"}}


def _recorded(tmp_path: Path, measured: gate.Measured = MEASURED, margin: str = "0") -> dict[tuple[str, str], gate.Row]:
    rows = [
        gate.Row(r.case, r.metric, r.value, margin if r.metric == "bytes" else r.margin)
        for r in gate.rows(measured, NOTES)
    ]
    gate.write(tmp_path / "table.csv", VERSIONS, rows)
    return gate.read(tmp_path / "table.csv")


def test_what_was_recorded_passes(tmp_path: Path) -> None:
    verdict = gate.compare(_recorded(tmp_path), MEASURED, NOTES, VERSIONS)
    assert verdict.passed
    assert str(verdict) == "passed"


@pytest.mark.parametrize(
    ("change", "kind", "words", "row"),
    [
        ({"launches": 6}, "regressions", "REGRESSION: a launches: 5 -> 6 (1.200 ×)", "a,launches,6,0"),
        ({"launches": 4}, "wins", "UNCLAIMED WIN: a launches: 5 -> 4 (0.800 ×)", "a,launches,4,0"),
        ({"attention": "math"}, "regressions", "REGRESSION: a attention: cudnn -> math", "a,attention,math,0"),
        ({"spills": 0}, "missing", "NO ROW: a spills is 0", "a,spills,0,0"),
    ],
)
def test_a_difference_fails_and_says_the_row_that_would_replace_it(
    tmp_path: Path, change: dict[str, int | str], kind: str, words: str, row: str
) -> None:
    verdict = gate.compare(_recorded(tmp_path), {"a": {**MEASURED["a"], **change}}, NOTES, VERSIONS)
    assert not verdict.passed
    assert len(getattr(verdict, kind)) == 1
    assert words in str(verdict)
    assert f"  {row}" in str(verdict).splitlines()


def test_a_case_without_any_row_fails(tmp_path: Path) -> None:
    verdict = gate.compare(_recorded(tmp_path), {"b": {"launches": 1}}, {}, VERSIONS)
    assert verdict.missing == ["b launches is 1"]


def test_a_row_that_nothing_measures_any_more_fails(tmp_path: Path) -> None:
    measured = {"a": {"launches": 5, "attention": "cudnn"}}
    assert gate.compare(_recorded(tmp_path), measured, NOTES, VERSIONS).stale == [
        "a,bytes,1000,0 is no longer measured"
    ]


def test_rows_of_cases_that_were_not_measured_are_left_alone(tmp_path: Path) -> None:
    recorded = _recorded(tmp_path, {**MEASURED, "b": {"launches": 1}})
    assert gate.compare(recorded, MEASURED, NOTES, VERSIONS).passed


@pytest.mark.parametrize(("value", "passed"), [(1000, True), (1010, True), (1011, False), (990, True), (989, False)])
def test_the_margin_holds_both_ways(tmp_path: Path, value: int, passed: bool) -> None:
    recorded = _recorded(tmp_path, margin="0.01")
    assert gate.compare(recorded, {"a": {**MEASURED["a"], "bytes": value}}, NOTES, VERSIONS).passed is passed


def test_notes_fail_nothing_and_explain_a_failure(tmp_path: Path) -> None:
    notes = {"a": {"launch 0": "norm without rotation", "launch 1": "rotation"}}
    assert gate.compare(_recorded(tmp_path), MEASURED, notes, VERSIONS).passed
    words = str(gate.compare(_recorded(tmp_path), {"a": {**MEASURED["a"], "launches": 6}}, notes, VERSIONS))
    assert "a launch 0: norm -> norm without rotation" in words
    assert "a launch 1 is new (rotation)" in words


def test_other_versions_are_not_judged(tmp_path: Path) -> None:
    verdict = gate.compare(_recorded(tmp_path), {"a": {"launches": 99}}, NOTES, {"torch": "2.0"})
    assert verdict.passed
    assert str(verdict) == "skipped: the table holds for torch 1.0, here is torch 2.0"


def test_a_table_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("case,value\n")
    with pytest.raises(ValueError, match="expected the header"):
        gate.read(path)
    path.write_text("case,metric,value,margin\na,b,1,0\na,b,2,0\n")
    with pytest.raises(ValueError, match="each case and metric once"):
        gate.read(path)
