"""Benchmarks and the gates that hold performance; not part of the installed package."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""Of the repository."""
