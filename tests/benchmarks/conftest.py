"""Reports that several tests read: each process that compiles is started once a session."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.codegen import CASES, Case, Report, unavailable
from benchmarks.codegen.cases import RECIPES
from benchmarks.codegen.run import ask, reports


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


@pytest.fixture(scope="session")
def planted(compiler: None) -> dict[str, Report | str]:
    """Reports of small modules on a described H100, or the words with which they were refused."""
    return {case.name: answer for case, answer in zip(PLANTED, ask(PLANTED), strict=True)}


@pytest.fixture(scope="session")
def full_size(compiler: None) -> dict[str, Report]:
    """Reports of 5b's block at full size on a described H100: ours, and diffusers'."""
    cases = [CASES["5b/ours/cudnn"], CASES["5b/diffusers/cudnn"]]
    answers = {case.name: answer for case, answer in zip(cases, ask(cases), strict=True)}
    assert not any(isinstance(answer, str) for answer in answers.values()), answers
    return {name: answer for name, answer in answers.items() if isinstance(answer, Report)}


@pytest.fixture(scope="session")
def quantized(compiler: None) -> dict[str, Report]:
    """Reports of 5b's block at full size on a described H100 by recipe; the other models' are slow tests."""
    cases = [CASES[f"5b/ours/cudnn/{recipe}"] for recipe in RECIPES]
    return dict(zip(RECIPES, reports(cases), strict=True))
