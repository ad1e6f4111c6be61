"""Expected results, held in a table: case, metric, value, margin.

Numbers are better when they are less (``MORE_IS_BETTER`` names the others). The gate fails on one that became worse, on
one that became better (an improvement is claimed by recording it, or the next regression hides behind it; times that
luck may have made better are only told), on one that has no row and on a row that nothing measures any more; it prints
the rows that would replace them. Words must stay the same. Rows whose margin is ``note`` fail nothing:
they say what changed. Rows of the case ``versions`` say for which versions the table holds; for others it says nothing.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

HEADER = ("case", "metric", "value", "margin")
NOTE = "note"
VERSIONS = "versions"
MORE_IS_BETTER = frozenset({"percent_of_ceilings", "speedup"})

Measured = Mapping[str, Mapping[str, int | float | str]]
"""Values by case and metric."""


@dataclass(frozen=True)
class Row:
    """One expected value."""

    case: str
    metric: str
    value: str
    margin: str = "0"
    """The relative change that is allowed either way, or ``note``."""

    def __str__(self) -> str:
        return ",".join((self.case, self.metric, self.value, self.margin))


@dataclass
class Verdict:
    """What a comparison found; each entry is a sentence."""

    regressions: list[str] = field(default_factory=list)
    wins: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What explains a failure."""
    told: list[str] = field(default_factory=list)
    """What became better and fails nothing."""
    replacement: list[Row] = field(default_factory=list)
    """The rows that would make it pass."""
    not_binding: str = ""
    """Why the table does not hold here, if it does not."""

    @property
    def passed(self) -> bool:
        """Nothing failed."""
        return not (self.regressions or self.wins or self.missing or self.stale)

    def __str__(self) -> str:
        if self.not_binding:
            return f"skipped: {self.not_binding}"
        titles = {
            "REGRESSION": self.regressions, "UNCLAIMED WIN": self.wins, "NO ROW": self.missing, "STALE ROW": self.stale
        }  # fmt: skip
        lines = [f"{title}: {entry}" for title, entries in titles.items() for entry in entries]
        if lines and self.notes:
            lines += ["what changed:", *(f"  {note}" for note in self.notes)]
        if self.replacement:
            lines += ["if this is meant, the rows are:", *(f"  {row}" for row in self.replacement)]
        lines = lines or ["passed"]
        return "\n".join([*lines, *(f"better (--accept records it): {entry}" for entry in self.told)])


def read(path: Path) -> dict[tuple[str, str], Row]:
    """The rows of a table.

    Raises:
        ValueError: it is not one, or has a row twice.
    """
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.reader(file))
    if not lines or tuple(lines[0]) != HEADER:
        raise ValueError(f"{path}: expected the header {','.join(HEADER)}")
    rows: dict[tuple[str, str], Row] = {}
    for number, line in enumerate(lines[1:], start=2):
        if len(line) != len(HEADER) or (line[0], line[1]) in rows:
            raise ValueError(
                f"{path}:{number}: expected {len(HEADER)} fields and each case and metric once, got {line}"
            )
        rows[line[0], line[1]] = Row(*line)
    return rows


def versions_of(table: Mapping[tuple[str, str], Row]) -> dict[str, str]:
    """The versions for which a table holds."""
    return {row.metric: row.value for row in table.values() if row.case == VERSIONS}


def write(path: Path, versions: Mapping[str, str], rows: Iterable[Row]) -> None:
    """A table that holds under these versions."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(HEADER)
        for row in [*(Row(VERSIONS, name, version) for name, version in versions.items()), *rows]:
            writer.writerow((row.case, row.metric, row.value, row.margin))


def compare(
    expected: Mapping[tuple[str, str], Row],
    measured: Measured,
    notes: Measured,
    versions: Mapping[str, str],
    *,
    told: Collection[str] = (),
    margins: Mapping[str, str] | None = None,
) -> Verdict:
    """Hold measurements against a table.

    Args:
        expected: the table's rows. Those of cases that were not measured now are left alone.
        measured: what was measured and is held.
        notes: what was seen beside it and only explains.
        versions: what it was measured with.
        told: metrics that fail nothing where they became better.
        margins: of new rows, by metric; 0 if not named.
    """
    verdict = Verdict()
    recorded = versions_of(expected)
    if recorded and recorded != dict(versions):
        verdict.not_binding = f"the table holds for {_words(recorded)}, here is {_words(versions)}"
        return verdict
    for case, metrics in measured.items():
        for metric, value in metrics.items():
            row = expected.get((case, metric))
            if row is None:
                verdict.missing.append(f"{case} {metric} is {value}")
                verdict.replacement.append(Row(case, metric, str(value), (margins or {}).get(metric, "0")))
            elif row.value != str(value) and row.margin != NOTE:
                _judge(verdict, row, value, told)
        for row in expected.values():
            if row.case == case and row.margin != NOTE and row.metric not in metrics:
                verdict.stale.append(f"{row} is no longer measured")
        verdict.notes += _changed(expected, case, notes.get(case, {}))
    return verdict


def rows(measured: Measured, notes: Measured) -> list[Row]:
    """The rows that would hold exactly this."""
    found = [Row(case, metric, str(value)) for case, metrics in measured.items() for metric, value in metrics.items()]
    found += [Row(case, name, str(value), NOTE) for case, seen in notes.items() for name, value in seen.items()]
    return sorted(found, key=lambda row: row.case)  # stable: within a case in the order given


def record(
    path: Path,
    versions: Mapping[str, str],
    measured: Measured,
    notes: Measured,
    *,
    order: Iterable[str] = (),
    margins: Mapping[str, str] | None = None,
) -> None:
    """Make a table hold exactly this.

    Rows of other cases stay if they hold for these versions, rows that are measured again keep their margins.

    Args:
        path: the table; it need not be there.
        versions: what it was measured with.
        measured: what is held.
        notes: what only explains.
        order: of the cases; where it is given, the others are dropped.
        margins: of new rows, by metric; 0 if not named.
    """
    before = read(path) if path.is_file() else {}
    if versions_of(before) != dict(versions):
        before = {}
    places = {name: place for place, name in enumerate(order)}
    kept = [row for row in before.values() if row.case not in {VERSIONS, *measured}]
    found = [*(row for row in kept if not places or row.case in places), *rows(measured, notes)]
    for place, row in enumerate(found):
        known = before.get((row.case, row.metric))
        if row.margin != NOTE:
            margin = (margins or {}).get(row.metric, "0") if known is None or known.margin == NOTE else known.margin
            found[place] = dataclasses.replace(row, margin=margin)
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, versions, sorted(found, key=lambda row: places.get(row.case, len(places))))


def _changed(expected: Mapping[tuple[str, str], Row], case: str, seen: Mapping[str, int | float | str]) -> list[str]:
    known = {row.metric: row.value for row in expected.values() if row.case == case and row.margin == NOTE}
    new = [f"{case} {name} is new ({value})" for name, value in seen.items() if name not in known]
    gone = [f"{case} {name} is gone ({value})" for name, value in known.items() if name not in seen]
    both = [name for name in seen if name in known and known[name] != str(seen[name])]
    return new + gone + [f"{case} {name}: {known[name]} -> {seen[name]}" for name in both]


def _judge(verdict: Verdict, row: Row, value: int | float | str, told: Collection[str]) -> None:
    change = f"{row.case} {row.metric}: {row.value} -> {value}"
    if isinstance(value, str):
        verdict.regressions.append(change)
    else:
        before = float(row.value)
        ratio = value / before if before else float("inf")
        if abs(value - before) <= float(row.margin) * abs(before):
            return
        worse = value < before if row.metric in MORE_IS_BETTER else value > before
        if not worse and row.metric in told:
            verdict.told.append(f"{change} ({ratio:.3f} ×)")
            return
        (verdict.regressions if worse else verdict.wins).append(f"{change} ({ratio:.3f} ×)")
    verdict.replacement.append(Row(row.case, row.metric, str(value), row.margin))


def _words(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items()) or "nothing"
