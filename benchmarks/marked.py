"""Parts of Markdown files that a command makes, between two marks."""

from __future__ import annotations

from pathlib import Path

END = "<!-- end -->\n"


def replaced(file: Path, command: str, text: str) -> str:
    """A file with that text in the part that a command makes.

    Args:
        file: it holds the line ``<!-- made by `COMMAND` -->`` and, after the part, ``<!-- end -->``.
        command: that makes the part.
        text: the part.

    Raises:
        ValueError: the file lacks the marks.
    """
    mark = f"<!-- made by `{command}` -->\n"
    before, begin, rest = file.read_text(encoding="utf-8").partition(mark)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{file}: expected the lines {mark.strip()} and {END.strip()}")
    return f"{before}{begin}\n{text}\n{end}{after}"
