from __future__ import annotations

import io

from cogx_fast.terminal import Progress, scaled, table
from tests.cases import for_each


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_for_terminals_only() -> None:
    piped, shown = io.StringIO(), Terminal()
    for stream in (piped, shown):
        progress = Progress(stream)
        progress.stage("loading")
        update = progress.steps("denoising", 4)
        for done in range(1, 5):
            update(done)
        progress.clear()
    assert piped.getvalue() == ""
    lines = shown.getvalue().split("\r\x1b[2K")
    assert "loading …" in lines
    assert any("4/4" in line for line in lines)
    assert lines[-1] == ""  # nothing of it stays
    assert "\n" not in shown.getvalue()


def test_table_is_aligned() -> None:
    text = table(
        ("", "a", "bb"), [("one", "1", "22"), ("longer", "333", "4"), ("sum", "334", "26")], last_is_total=True
    )
    assert text.split("\n") == [
        "           a   bb",
        "─────────────────",
        "one        1   22",
        "longer   333    4",
        "─────────────────",
        "sum      334   26",
    ]


@for_each(
    "value, text",
    [
        (0, "0 B"),
        (999, "999 B"),
        (5_570_283_072, "5.57 GB"),
        (22.28e9, "22.3 GB"),
        (326e12, "326 TB"),
        (999_900, "1.00 MB"),
    ],
)
def test_scaled(value: float, text: str) -> None:
    assert scaled(value, "B") == text
