"""Reports that several tests read: each process that compiles is started once a session."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.codegen import CASES, Case, Report, unavailable
from benchmarks.codegen.cases import RECIPES
from benchmarks.codegen.run import ask


def _planted(name: str, build: str = "", sdpa: Any = "cudnn", **arguments: Any) -> Case:
    return Case(name=name, build=f"tests.benchmarks.planted:{build or name}", sdpa=sdpa, arguments=arguments)


PLANTED = [
    _planted("block"),
    _planted("defused"),
    _planted("copied"),
    _planted("upcast"),
    _planted("flex", "block", sdpa=None, attention="flex"),
    _planted("known", rows=100, width=256),
    _planted("unstated", "attend", sdpa=None),
    _planted("impossible", "attend", sdpa="flash", masked=True),
    _planted("graph_break"),
    _planted("odd", "quantized", recipe="fp8-dynamic", tokens=80),
    _planted("fp8", "quantized", recipe="fp8-dynamic", tokens=2060),
    _planted("packaged"),
    _planted("packaged fp8", "packaged", recipe="fp8-dynamic", tokens=2060),
    _planted("unflattened", recipe="fp8-dynamic", tokens=2060),
]


@pytest.fixture(scope="session")
def compiler() -> None:
    """Skips where nothing can be compiled for a GPU."""
    if reason := unavailable():
        pytest.skip(reason)


FULL_SIZE = ("5b/ours/cudnn", "5b/diffusers/cudnn")
QUANTIZED = {recipe: f"5b/ours/cudnn/{recipe}" for recipe in RECIPES}
"""The other models' are slow tests."""


@pytest.fixture(scope="session")
def generated(compiler: None) -> dict[str, Report | str]:
    """What one process generated for a described H100, by case, or the words with which it refused."""
    cases = [*PLANTED, *(CASES[name] for name in (*FULL_SIZE, *QUANTIZED.values()))]
    return {case.name: answer for case, answer in zip(cases, ask(cases), strict=True)}


def _report(answer: Report | str) -> Report:
    assert isinstance(answer, Report), answer
    return answer


@pytest.fixture(scope="session")
def planted(generated: dict[str, Report | str]) -> dict[str, Report | str]:
    """Of small modules; some are refused."""
    return {case.name: generated[case.name] for case in PLANTED}


@pytest.fixture(scope="session")
def full_size(generated: dict[str, Report | str]) -> dict[str, Report]:
    """Of 5b's block at full size: ours, and diffusers'."""
    return {name: _report(generated[name]) for name in FULL_SIZE}


@pytest.fixture(scope="session")
def quantized(generated: dict[str, Report | str]) -> dict[str, Report]:
    """Of 5b's block at full size, by recipe."""
    return {recipe: _report(generated[name]) for recipe, name in QUANTIZED.items()}
