"""Every case of the plan: red if it is wrong, or worse than the table of its device."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.gpu import suite
from benchmarks.gpu.cases import Case
from benchmarks.gpu.models import UnsupportedError


def test_case(
    case: Case, gpu: suite.Suite, benchmark: Any, playback: Any, record_property: Callable[..., None]
) -> None:
    record_property("environment", gpu.facts)
    record_property("ceilings", gpu.ceilings)
    try:
        found = gpu.run(case)
    except (UnsupportedError, NotImplementedError) as error:
        pytest.skip(f"unsupported here: {error}")
    record_property("found", suite.as_json(found))
    benchmark.group, benchmark.extra_info["found"] = f"{case.model}/{case.part}", suite.as_json(found)
    benchmark.pedantic(playback.step, (iter(found.seconds),), rounds=len(found.seconds))
    if found.recorded:
        warnings.warn(f"{case}: {found.recorded}", stacklevel=1)
    if not found.verdict.passed:
        pytest.fail(str(found.verdict), pytrace=False)
