"""Quantization as a transform of weights as they come (``assemble.Transform``)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from torch import nn

from cogx_fast.model.transformer import CogVideoXTransformer
from cogx_fast.weights.assemble import Store

if TYPE_CHECKING:
    from quant import Recipe
    from quant.apply import Plan


class Quantize:
    """Quantizes each part with a recipe.

    Args:
        recipe: the name of a shipped one, a ``.toml`` file, or a ``quant.Recipe``.
        device: where the model goes, which decides what can run.
    """

    def __init__(self, recipe: str | os.PathLike[str] | Recipe, device: torch.device) -> None:
        self._recipe, self._device = recipe, device
        self._plan: Plan | None = None

    def check(self, model: CogVideoXTransformer, store: Store) -> None:
        """Decide what becomes of every linear, and note the recipe in the model.

        Raises:
            QuantError: (a ValueError) a recipe that does not fit the model or cannot run there.
        """
        from quant.apply import plan, remember

        self._plan = plan(model, self._recipe, device=self._device)
        remember(model, self._plan.recipe)

    def apply(self, part: nn.Module, name: str) -> None:
        """Quantize the linears of a part, where the model goes."""
        assert self._plan is not None, "check comes first"
        self._plan.apply(part, name, device=self._device, measure=False)


__all__ = ["Quantize"]
