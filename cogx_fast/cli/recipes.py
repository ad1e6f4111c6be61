"""``cogx-fast recipes``: the quantization recipes that come along."""

from __future__ import annotations

import argparse
from typing import Any

from cogx_fast.cli.arguments import add_command
from cogx_fast.terminal import Progress


def add(commands: Any) -> None:
    """Add the command to the parser."""
    add_command(
        commands, "recipes", run, "list the quantization recipes",
        "Name, hardware needed, measured quality and description of the recipes that come along.",
    )  # fmt: skip


def run(arguments: argparse.Namespace, progress: Progress) -> tuple[dict[str, Any], str]:
    """Carry it out: the report, and its text."""
    import quant

    recipes = [quant.load_recipe(name) for name in quant.recipe_names()]
    report = {
        "recipes": [
            {
                "name": recipe.name,
                "description": recipe.description,
                "hardware": str(recipe.requires),
                "schemes": list(recipe.schemes),
                "quality": recipe.quality,
                "file": recipe.origin,
            }
            for recipe in recipes
        ]
    }
    width = max(len(recipe.name) for recipe in recipes)
    indent = " " * (width + 3)
    lines = []
    for recipe in recipes:
        measured = ", ".join(f"{key} {value}" for key, value in (recipe.quality or {}).items())
        lines.append(f"{recipe.name:<{width}}   {recipe.description}")
        lines.append(f"{indent}on {recipe.requires}; quality: {measured or 'not measured yet'}")
    return report, "\n".join(lines)


__all__ = ["add", "run"]
