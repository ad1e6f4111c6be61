"""Many cases in one test, each of which is named where it fails."""

from __future__ import annotations

import functools
import inspect
import itertools
import traceback
from collections.abc import Callable, Iterable
from typing import Any

import pytest

Test = Callable[..., None]


def for_each(*tables: Any, ids: Iterable[str] | None = None) -> Callable[[Test], Test]:
    """Runs a test once a row, as ``parametrize`` does, under one id: every row is run, and those that fail are named.

    ``tmp_path`` and ``monkeypatch`` are new in each row; any other fixture is made once and shared.

    Args:
        tables: Names of values, parted by commas, and rows of them: values, or tuples if there are several names; then
            more names and rows, for every combination of the rows.
        ids: What the rows are called; their values, if not given.
    """
    names = [words.replace(",", " ").split() for words in tables[::2]]
    parts = [[row if len(own) > 1 else (row,) for row in rows] for own, rows in zip(names, tables[1::2], strict=True)]
    called = [*itertools.chain(*names)]
    table = [tuple(itertools.chain(*rows)) for rows in itertools.product(*parts)]
    labels = [", ".join(map(label, row)) for row in table] if ids is None else [*ids]
    assert len(labels) == len(table) > 0, "a test of nothing cannot fail"

    def decorate(test: Test) -> Test:
        @functools.wraps(test)
        def run(*self: Any, **fixtures: Any) -> None:
            failed: list[tuple[str, str]] = []
            for number, (case, row) in enumerate(zip(labels, table, strict=True)):
                own = fixtures | dict(zip(called, row, strict=True))
                try:
                    with pytest.MonkeyPatch.context() as monkeypatch:
                        if "monkeypatch" in own:
                            own["monkeypatch"] = monkeypatch
                        if "tmp_path" in own:
                            own["tmp_path"] = own["tmp_path"] / f"case {number}"
                            own["tmp_path"].mkdir()
                        test(*self, **own)
                except (Exception, pytest.fail.Exception) as error:  # noqa: BLE001
                    frames = error.__traceback__ and error.__traceback__.tb_next
                    failed.append((case, "".join(traceback.format_exception(type(error), error, frames))))
                    if "pytest-timeout" in str(error):  # which counts no more
                        break
                except pytest.skip.Exception as reason:
                    failed.append((case, f"a part of a test cannot be skipped ({reason}): leave it out\n"))
            if failed:
                words = f"{len(failed)} of {len(table)} cases failed: {'; '.join(case for case, _ in failed)}"
                blocks = [f"---- {case} ----\n{text}" for case, text in failed]
                pytest.fail("\n".join([words, "", *blocks]), pytrace=False)

        parameters = inspect.signature(test).parameters
        run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [parameter for name, parameter in parameters.items() if name not in called]
        )
        return run

    return decorate


def label(value: Any) -> str:
    """A value in short: a function by its name, a tensor by its size."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{value.dtype} {tuple(value.shape)}"
    return " ".join(str(getattr(value, "__name__", value))[:60].split())
