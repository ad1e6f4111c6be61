"""Step schedules by name, and as TOML files: small, to be read and edited by people."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cogx_fast.config import TransformerConfig
from cogx_fast.runtime.step_caching.step_schedule import (
    NAMED,
    FirstBlock,
    Given,
    Mask,
    StepCacheError,
    StepSchedule,
    Strategy,
    TeaCache,
)
from cogx_fast.whole_file import write_whole

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FORMAT = 1
_TYPES: dict[str, tuple[type, ...]] = {
    "num_layers": (int,), "forecast": (str,), "scheduler": (str,), "config_hash": (str,), "error": (int, float),
    "origin": (str,),
}  # fmt: skip


def choose_strategy(
    value: StepSchedule | str | os.PathLike[str], config: TransformerConfig | None = None
) -> Strategy | FirstBlock:
    """What ``step_cache=`` means.

    Args:
        value: a schedule, a TOML file of one, "quality", "balanced", "fast", "teacache:0.2", "mask:1,1,0,…", or
            "first-block:0.08".
        config: of the model that it is for; None: what depends on it is not checked yet.

    Returns:
        Where the schedule comes from.

    Raises:
        StepCacheError: it is none of these, or another model's.
    """
    if isinstance(value, StepSchedule):
        if config is not None:
            value.check(config)
        return Given(value)
    if not isinstance(value, str | os.PathLike):
        raise StepCacheError(f"step_cache is a {type(value).__name__}, expected a StepSchedule, a name or a file")
    text = os.fspath(value)
    if text in NAMED:
        return NAMED[text]
    name, colon, argument = text.partition(":")
    if colon and name == "mask":
        marks = [mark.strip() for mark in argument.split(",")]
        if not set(marks) <= {"0", "1"}:
            raise StepCacheError(f"step_cache is {text!r}, expected a 0 or 1 for each step: 'mask:1,1,0,1'")
        if marks[0] != "1":
            raise StepCacheError("the mask skips the first step, but there is nothing yet to take: begin with 1")
        return Mask(tuple(mark == "1" for mark in marks))
    if colon and name in ("teacache", "first-block"):
        try:
            threshold = float(argument)
        except ValueError:
            threshold = math.nan
        if not 0 <= threshold < math.inf:
            raise StepCacheError(f"step_cache is {text!r}, expected a number of 0 or more, as in '{name}:0.2'")
        return TeaCache(threshold) if name == "teacache" else FirstBlock(threshold)
    if text.endswith(".toml") or Path(text).is_file():
        return choose_strategy(read_schedule(text), config)
    raise StepCacheError(
        f"step_cache is {text!r}, expected {', '.join(NAMED)}, 'teacache:0.2', 'mask:1,1,0,…', 'first-block:0.08' or "
        "the .toml file of a schedule"
    )


def foresee_schedule(
    value: StepSchedule | str | os.PathLike[str], config: TransformerConfig, steps: int
) -> StepSchedule:
    """The schedule that ``step_cache=`` gives a model in so many steps, where it does not hang on the weights.

    Raises:
        StepCacheError: it does, or it is none.
    """
    strategy = choose_strategy(value, config)
    if isinstance(strategy, FirstBlock | TeaCache):
        raise StepCacheError(f"step_cache is {value!r}, which depends on the model's weights: give a name or a file")
    layers: Any = SimpleNamespace(transformer_blocks=range(config.num_layers))
    return strategy.schedule(layers, range(steps, 0, -1))


def render_schedule(schedule: StepSchedule) -> str:
    """The schedule as TOML."""
    lines = ["# A step schedule of cogx_fast: how many of the first blocks each step computes.", f"format = {FORMAT}"]
    for field in dataclasses.fields(schedule):
        value = getattr(schedule, field.name)
        if value is None:
            continue
        text = json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
        lines.append(f"{field.name} = {text}")  # TOML writes these as JSON does
    return "\n".join(lines) + "\n"


def write_schedule(schedule: StepSchedule, path: str | os.PathLike[str]) -> None:
    """Write a schedule whole, or not at all.

    Raises:
        OSError: it cannot be written.
    """
    write_whole(path, render_schedule(schedule))


def read_schedule(path: str | os.PathLike[str]) -> StepSchedule:
    """Read a schedule that ``write_schedule`` wrote.

    Raises:
        StepCacheError: it holds none, or one of a newer format.
        OSError: it cannot be read.
    """
    try:
        return _parse(tomllib.loads(Path(path).read_text(encoding="utf-8")))
    except (StepCacheError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise StepCacheError(f"{path}: {error}: this is no step schedule that can be used") from None


def _parse(data: dict[str, Any]) -> StepSchedule:
    if data.get("format") != FORMAT:
        raise StepCacheError(f"format is {data.get('format')!r}, expected {FORMAT}")
    known = {field.name for field in dataclasses.fields(StepSchedule)}
    unknown = sorted(set(data) - known - {"format"})
    if unknown:
        raise StepCacheError(f"unknown keys {', '.join(unknown)}")
    missing = sorted({"blocks", "num_layers"} - set(data))
    if missing:
        raise StepCacheError(f"{', '.join(missing)} is missing")
    lists: dict[str, Any] = {name: data[name] for name in ("blocks", "unconditional", "timesteps") if name in data}
    for name, value in lists.items():
        if not isinstance(value, list) or any(not isinstance(each, int) or isinstance(each, bool) for each in value):
            raise StepCacheError(f"{name} is {str(value)[:80]}, expected a list of whole numbers, one for each step")
    weights = data.get("weights")
    if weights is not None:
        rows = weights if isinstance(weights, list) else [weights]
        if any(not isinstance(row, list) or any(type(each) not in (int, float) for each in row) for row in rows):
            raise StepCacheError(f"weights is {str(weights)[:80]}, expected a list of numbers for each step")
        lists["weights"] = [tuple(map(float, row)) for row in rows]
    values = {name: data[name] for name in _TYPES if name in data}
    for name, value in values.items():
        if not isinstance(value, _TYPES[name]) or isinstance(value, bool):
            raise StepCacheError(f"{name} is {value!r}, expected a {' or '.join(t.__name__ for t in _TYPES[name])}")
    values |= {name: tuple(value) for name, value in lists.items()}
    return StepSchedule(**values)


__all__ = ["choose_strategy", "foresee_schedule", "read_schedule", "render_schedule", "write_schedule"]
