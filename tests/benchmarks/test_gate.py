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


def test_what_is_told_fails_nothing_where_it_became_better_and_shares_are_better_when_more(tmp_path: Path) -> None:
    measured = {"a": {"ratio": 0.8, "percent_of_ceilings": 60.0}}
    recorded = _recorded(tmp_path, measured)

    def words(**values: float) -> str:
        return str(gate.compare(recorded, {"a": {**measured["a"], **values}}, NOTES, VERSIONS, told=measured["a"]))

    assert words(ratio=0.7) == "passed\nbetter (--accept records it): a ratio: 0.8 -> 0.7 (0.875 ×)"
    assert words(percent_of_ceilings=70.0).startswith("passed\nbetter")
    assert "REGRESSION: a ratio: 0.8 -> 0.9" in words(ratio=0.9)
    assert "REGRESSION: a percent_of_ceilings: 60.0 -> 50.0" in words(percent_of_ceilings=50.0)


def test_recording_keeps_other_cases_and_margins_of_the_same_versions(tmp_path: Path) -> None:
    path = tmp_path / "new" / "table.csv"
    gate.record(path, VERSIONS, {"a": {"bytes": 1}, "b": {"bytes": 2}}, NOTES, margins={"bytes": "0.1"})
    path.write_text(path.read_text().replace("b,bytes,2,0.1", "b,bytes,2,0.3"))
    gate.record(path, VERSIONS, {"b": {"bytes": 3, "launches": 4}}, {}, order=("b", "a"), margins={"bytes": "0.1"})
    rows = [str(row) for row in gate.read(path).values()]
    assert rows == ["versions,torch,1.0,0", "b,bytes,3,0.3", "b,launches,4,0", "a,bytes,1,0.1", "a,launch 0,norm,note"]
    gate.record(path, VERSIONS, {"b": {"bytes": 3}}, {}, order=("b",))
    assert {row.case for row in gate.read(path).values()} == {gate.VERSIONS, "b"}
    gate.record(path, {"torch": "2.0"}, {"c": {"bytes": 3}}, {})
    assert {row.case for row in gate.read(path).values()} == {gate.VERSIONS, "c"}


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
