"""The benchmark of sparse attention: its recorded results, and what it says of attention that has a known answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import sparse


@pytest.fixture(scope="module")
def recorded() -> list[sparse.Row]:
    return [sparse.Row(*each) for each in json.loads((sparse.RESULTS / "sparse.json").read_text(encoding="utf-8"))]


def test_recorded_time_is_proportional_to_what_is_kept(recorded: list[sparse.Row]) -> None:
    timed = [row for row in recorded if row.case == "time"]
    assert {row.pattern for row in timed} == {"full", *map(str, sparse.PATTERNS)}
    for row in timed:
        assert 0.75 <= row.values["ratio"] / row.kept <= 1.25, row


def test_errors_of_uniform_attention_are_those_of_leaving_out_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mean of n of m independent values differs from the mean of all by √(m / n − 1) of its size."""
    monkeypatch.setattr(sparse, "GRIDS", {"5b": (13, 30, 45)})
    monkeypatch.setattr(sparse, "SHAPES", ("uniform", "near"))
    rows = {(row.case, row.pattern): row for row in sparse.shape_errors(rows=256)}
    for pattern in map(str, sparse.PATTERNS):
        uniform, near = rows["uniform, 5b", pattern], rows["near, 5b", pattern]
        least = (1 / uniform.kept - 1) ** 0.5  # of the mean row; rows that keep less err more
        assert 0.9 * least <= uniform.values["error"] <= 1.5 * least
        assert near.values["error"] < uniform.values["error"]


def test_the_drawing_has_every_case(recorded: list[sparse.Row], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    sparse.draw(recorded, tmp_path / "sparse.svg", device="cpu")
    assert (tmp_path / "sparse.svg").stat().st_size > 10_000
    assert {row.case.split(",")[0] for row in recorded} == {"time", "tiny", *sparse.SHAPES}


def test_far_attention_looks_at_the_opposite_place() -> None:
    q, k, _ = sparse.synthetic("far", "5b")
    video = slice(sparse.TEXT, None)
    strongest = (q[video][:5] @ k[video].T).argmax(-1)
    places = torch.stack([strongest // 1350, strongest % 1350 // 45, strongest % 45], 1)
    assert (places - torch.tensor([12, 29, 42])).abs().amax() <= 8
