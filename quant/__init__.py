"""Quantization recipes for video transformers, on torchao.

``load_recipe`` and ``recipe_names`` read recipes; ``quantize`` carries one out on a model, ``plan`` says beforehand
what it will do. torch and torchao are imported when they are first needed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from quant.errors import QuantError
from quant.recipe import Recipe, Rule, load_recipe, recipe_names

if TYPE_CHECKING:
    from quant.apply import LinearReport, Plan, Report, plan, quantize, recipe_of

_LAZY = ("LinearReport", "Plan", "Report", "plan", "quantize", "recipe_of")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module("quant.apply"), name)
    raise AttributeError(f"module 'quant' has no attribute {name!r}")


__all__ = [
    "LinearReport", "Plan", "QuantError", "Recipe", "Report", "Rule", "load_recipe", "plan", "quantize", "recipe_names",
    "recipe_of",
]  # fmt: skip
