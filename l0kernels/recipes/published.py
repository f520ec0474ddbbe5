# SPDX-License-Identifier: Apache-2.0
"""All recipes by name, and their description."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from l0kernels.recipes import mnist, vision
from l0kernels.recipes.errors import InputError
from l0kernels.recipes.recipe import Recipe, Settings

# Shown although they are what they are by default.
ALWAYS = ("optimizer", "penalty_n")
NO_ROWS = "  published results: none at hand"

RECIPES = {recipe.name: recipe for recipe in (*mnist.RECIPES, *vision.RECIPES)}


def find(name: str) -> Recipe:
    """A recipe by name.

    Raises:
        InputError: no recipe of that name.
    """
    if name not in RECIPES:
        raise InputError(f"unknown recipe {name!r}: expected one of {', '.join(RECIPES)}")
    return RECIPES[name]


def describe() -> str:
    """All recipes with their settings, sources and what is unconfirmed, as text."""
    return "\n\n".join(_describe(recipe) for recipe in RECIPES.values())


def _describe(recipe: Recipe) -> str:
    lines = [f"{recipe.name}: {recipe.summary}"]
    for name, named in recipe.named.items():
        lines.append(f"  settings {name}: {named.source}")
        for setting in fields(Settings):
            value = getattr(named.settings, setting.name)
            if setting.default is MISSING or value != setting.default or setting.name in ALWAYS:
                lines.append(f"    {setting.name:<14} {_value(value)}")
    lines += ["  notes", *(f"    - {note}" for note in recipe.notes)]
    lines += ["  published results", *(f"    - {row}" for row in recipe.rows)]
    return "\n".join(lines if recipe.rows else [*lines[:-1], NO_ROWS])


def _value(value: Any) -> str:
    if value is None:
        return "size of the whole training set"
    if isinstance(value, tuple):
        return ", ".join(f"{v:g}" for v in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
