"""Many cases in one test: no failure hides another, and each is named with its reason."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.cases import for_each


def test_all_rows_run_and_those_that_fail_are_named_with_their_reasons() -> None:
    ran = []

    @for_each("number, word", [(1, "one"), (2, "two"), (3, "three")], "sign", "+-")
    def planted(number: int, word: str, sign: str) -> None:
        ran.append(f"{sign}{number}")
        assert sign == "+" or number != 2, f"{word} is even"
        if ran[-1] == "+3":
            pytest.skip("odd")

    with pytest.raises(pytest.fail.Exception) as caught:
        planted()
    assert ran == ["+1", "-1", "+2", "-2", "+3", "-3"]
    assert str(caught.value).startswith("2 of 6 cases failed: 2, two, -; 3, three, +\n")
    assert "AssertionError: two is even" in str(caught.value)
    assert "cannot be skipped (odd)" in str(caught.value)
    with pytest.raises(AssertionError, match="cannot fail"):
        for_each("number", [])


def test_folders_and_patches_are_a_rows_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @for_each("word", ["one", "two"], ids=["first", "second"])
    def planted(word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert not [*tmp_path.iterdir()]
        assert "COGX_FAST_TEST" not in os.environ
        (tmp_path / word).touch()
        monkeypatch.setenv("COGX_FAST_TEST", word)

    planted(tmp_path=tmp_path, monkeypatch=monkeypatch)
    assert sorted(path.name for path in tmp_path.glob("*/*")) == ["one", "two"]


def test_what_hangs_ends_the_test_for_nothing_counts_any_more() -> None:
    @for_each("number", [1, 2])
    def planted(number: int) -> None:
        pytest.fail("Timeout (>300.0s) from pytest-timeout.")

    with pytest.raises(pytest.fail.Exception, match="1 of 2 cases failed: 1\n"):
        planted()
