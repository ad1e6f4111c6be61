"""What the command line shows: tables on stdout, progress on stderr where that is a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TextIO

_BAR = 28
_PREFIXES = ("", "k", "M", "G", "T", "P", "E")


class Progress:
    """One line on a terminal that says what is going on and how far it is; silent where stderr is a pipe or a file."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._shown = self._stream.isatty()

    def stage(self, text: str) -> None:
        """Say what begins now, e.g. "compiling"."""
        self._show(f"{text} …")

    def steps(self, text: str, total: int) -> Callable[[int], None]:
        """A bar; call what is returned with the number of steps done."""
        started = time.perf_counter()

        def update(done: int) -> None:
            filled = round(_BAR * done / total)
            seconds = (time.perf_counter() - started) / max(done, 1)
            rest = f"{seconds * (total - done):.0f} s left" if done < total else f"{seconds:.3g} s each"
            self._show(f"{text:<34} {'━' * filled}{'╌' * (_BAR - filled)} {done}/{total}  {rest}")

        update(0)
        return update

    def clear(self) -> None:
        """Take the line away."""
        self._show("")

    def _show(self, line: str) -> None:
        if self._shown:
            self._stream.write(f"\r\x1b[2K{line}")
            self._stream.flush()


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, last_is_total: bool = False) -> str:
    """Aligned columns under a header: the first to the left, the others to the right."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def format_line(line: Sequence[str]) -> str:
        cells = [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        return "   ".join(cells).rstrip()

    rule = "─" * (sum(widths) + 3 * (len(widths) - 1))
    formatted = [format_line(line) for line in lines]
    if last_is_total:
        formatted.insert(-1, rule)
    return "\n".join([formatted[0], rule, *formatted[1:]])


def pairs(named: Sequence[tuple[str, str]]) -> str:
    """Values behind their names, a line each."""
    width = max(len(name) for name, _ in named)
    return "\n".join(f"{name.ljust(width)}   {value}" for name, value in named)


def scaled(value: float, unit: str = "") -> str:
    """A number with the fitting decimal prefix: ``scaled(11.2e9, "B")`` is "11.2 GB"."""
    power = 0
    while abs(value) >= 999.5 and power < len(_PREFIXES) - 1:
        value, power = value / 1000, power + 1
    digits = 0 if value >= 99.95 or (power == 0 and value == int(value)) else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {_PREFIXES[power]}{unit}".rstrip()


__all__ = ["Progress", "pairs", "scaled", "table"]
