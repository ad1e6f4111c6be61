"""Benchmarks and the gates that hold performance; not part of the installed package."""
