"""``cogx-fast export``: its arguments (its report and the package itself: tests/runtime/test_package.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cogx_fast.cli.export import read_sizes
from cogx_fast.config import PRESETS
from tests.cases import for_each
from tests.conftest import run_cli


@for_each(
    "text, tokens",
    [
        (None, (2, 226 + 13 * 30 * 45)),
        ("49x480x720", (13 * 30 * 45 + 1, 226 + 13 * 30 * 45)),
        ("1x16x16, 49×480×720,9x64x64", (2, 226 + 13 * 30 * 45)),
    ],
)
def test_sizes_as_tokens(text: str | None, tokens: tuple[int, int]) -> None:
    sizes = read_sizes(text, 2, PRESETS["5b"])
    assert (sizes.tokens, sizes.batch) == (tokens, 2)


@for_each(
    "arguments, message",
    [
        (["--sizes", "49x480"], "expected FRAMESxHEIGHTxWIDTH"),
        (["--sizes", "48x64x64"], "frames is 48"),
        (["--sizes", "9x65x64"], "height is 65"),
        (["--batch", "1"], "batch is 1"),
        (["--out", "absent/m.pt2"], "no such directory"),
        (["--attention", "fast"], "choose one of"),
    ],
)
def test_what_cannot_be_is_said(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch._inductor

    def nothing(*_: Any, **__: Any) -> None:
        pytest.fail("compiled all the same")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", nothing)
    finished = run_cli("export", "tiny", "--out", tmp_path / "m.pt2", *arguments)
    assert finished.status == 2
    assert message in finished.err
    assert list(tmp_path.iterdir()) == []
