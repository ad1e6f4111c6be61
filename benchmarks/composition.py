"""The docs' list of what does not go together, made of the table that refuses it.

python -m benchmarks.composition
"""

from __future__ import annotations

import textwrap

from benchmarks import ROOT
from benchmarks.marked import replaced
from cogx_fast.runtime.composition import REFUSALS, Refusal

DOCS = ROOT / "docs" / "limits.md"


def current() -> str:
    """The page as the table makes it."""
    return replaced(DOCS, "python -m benchmarks.composition", "\n".join(map(_item, REFUSALS)) + "\n")


def _item(refusal: Refusal) -> str:
    words = f"{_code(refusal.one.value)} and {_code(refusal.other.value)}, {refusal.why}: {refusal.instead}."
    return textwrap.fill(words, 120, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)


def _code(words: str) -> str:
    return f"`{words}`" if "=" in words else words


if __name__ == "__main__":
    DOCS.write_text(current(), encoding="utf-8")
