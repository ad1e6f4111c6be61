"""Attention plans by name, and as TOML files: small, to be read and edited by people."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cogx_fast.attention.plan import BUILT_IN, AttentionPlan, PlanError
from cogx_fast.attention.windows import Pattern
from cogx_fast.config import TransformerConfig
from cogx_fast.whole_file import write_whole

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FORMAT = 1
_SCALARS = ("dense_above", "block_size", "config_hash", "weights_hash", "origin")


def choose_plan(plan: AttentionPlan | str | os.PathLike[str], config: TransformerConfig) -> AttentionPlan:
    """A plan from itself, the name of a built-in one, or its file.

    Raises:
        PlanError: it is no plan, or not one for that configuration.
        OSError: the file cannot be read.
    """
    if isinstance(plan, str) and plan in BUILT_IN:
        return BUILT_IN[plan](config)
    if isinstance(plan, str | os.PathLike):
        if not Path(plan).exists():
            raise PlanError(
                f"attention plan {str(plan)!r} is no file and none of the built-in ones ({', '.join(BUILT_IN)})"
            )
        plan = read_plan(plan)
    if not isinstance(plan, AttentionPlan):
        raise PlanError(f"attention_plan is a {type(plan).__name__}, expected an AttentionPlan, a name or a file")
    plan.check(config)
    return plan


def write_plan(plan: AttentionPlan, path: str | os.PathLike[str]) -> None:
    """Write a plan whole, or not at all.

    Args:
        plan: what to write.
        path: the file, replaced if it is there.

    Raises:
        OSError: it cannot be written.
    """
    write_whole(path, render_plan(plan))


def render_plan(plan: AttentionPlan) -> str:
    """The plan as TOML."""
    lines = ["# An attention plan of cogx_fast: which window each layer (row) and head has.", f"format = {FORMAT}"]
    for name in _SCALARS:
        value = getattr(plan, name)
        if value is not None:
            lines.append(f"{name} = {json.dumps(value, ensure_ascii=False)}")  # TOML writes these as JSON does
    lines += [f"tile = {list(plan.tile)}", "choice = ["]
    lines += [f"  {list(row)}," for row in plan.choice] + ["]"]
    for pattern in plan.patterns:
        lines += ["", "[[patterns]]", f'kind = "{pattern.kind}"']
        lines += [f"{name} = {float(value)}" for name in ("frames", "space") if (value := getattr(pattern, name))]
    return "\n".join(lines) + "\n"


def read_plan(path: str | os.PathLike[str]) -> AttentionPlan:
    """Read a plan.

    Args:
        path: a file that ``write_plan`` wrote.

    Raises:
        PlanError: it holds no plan, or one of a newer format.
        OSError: it cannot be read.
    """
    try:
        data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        return _parse(data)
    except (PlanError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise PlanError(f"{path}: {error}: make the plan again with `cogx-fast plan`") from None


def _parse(data: Mapping[str, Any]) -> AttentionPlan:
    if data.get("format") != FORMAT:
        raise PlanError(f"format is {data.get('format')!r}, expected {FORMAT}")
    known = {field.name for field in dataclasses.fields(AttentionPlan)} | {"format"}
    unknown = sorted(set(data) - known)
    if unknown:
        raise PlanError(f"unknown keys {', '.join(unknown)}")
    try:
        return AttentionPlan(
            patterns=tuple(Pattern(**_mapping(each)) for each in _list(data["patterns"])),
            choice=tuple(tuple(_whole(index) for index in _list(row)) for row in _list(data["choice"])),
            tile=_tile(data["tile"]),
            **{name: _scalar(name, data[name]) for name in _SCALARS if name in data},
        )
    except KeyError as error:
        raise PlanError(f"{error} is missing") from None
    except PlanError:
        raise
    except (TypeError, ValueError) as error:
        raise PlanError(str(error)) from None


def _scalar(name: str, value: Any) -> Any:
    if name == "block_size":
        return _whole(value)
    if name == "dense_above":
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise PlanError(f"dense_above is {value!r}, expected a number")
        return float(value)
    if not isinstance(value, str):
        raise PlanError(f"{name} is {value!r}, expected a text")
    return value


def _tile(value: Any) -> tuple[int, int]:
    sizes = [_whole(each) for each in _list(value)]
    if len(sizes) != 2:
        raise PlanError(f"tile is {value!r}, expected frames and rows")
    return sizes[0], sizes[1]


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise PlanError(f"got {value!r}, expected a whole number")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise PlanError(f"got {value!r}, expected a list")
    return value


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise PlanError(f"got {value!r} for a pattern, expected a table")
    return value


__all__ = ["choose_plan", "read_plan", "render_plan", "write_plan"]
