"""Recipe files: YAML with the names of the options, and the bundled ones in `recipes/`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from llmsqueeze.errors import RecipeError, nearest
from llmsqueeze.files import read_yaml


def read_recipe(path: Path) -> dict[str, Any]:
    """The settings in a YAML file. Raises RecipeError if it is missing or no mapping of keys to values."""
    settings = read_yaml(path, "recipe file")
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise RecipeError(f"{path} is no recipe: it must map keys to values, such as `bits: 3`")
    return settings


def find_recipe(name: str) -> Path:
    """The file `name`, or the recipe of that name among the bundled ones. Raises RecipeError."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    bundled = {recipe_name(file): file for file in bundled_recipes()}
    if name in bundled:
        return bundled[name]
    if path.is_dir():
        raise RecipeError(f"{path} is a folder; name a recipe file")
    raise RecipeError(f"there is no recipe file {name}{nearest(name, bundled) or ';'} bundled: {', '.join(bundled)}")


def bundled_recipes() -> list[Path]:
    """The bundled recipes: beside the package in a checkout, under the prefix where it was installed."""
    for folder in (Path(__file__).parents[2] / "recipes", Path(sys.prefix) / "share" / "llmsqueeze" / "recipes"):
        if folder.is_dir():
            return sorted(folder.glob("*.yaml")) + sorted(folder.glob("papers/*.yaml"))
    return []


def recipe_name(path: Path) -> str:
    """'gwq-3bit', 'papers/gwq'."""
    return f"papers/{path.stem}" if path.parent.name == "papers" else path.stem


def describe_recipes() -> list[dict[str, str]]:
    """Name and purpose of every bundled recipe; the purpose is the first sentence of its comment."""
    recipes = []
    for path in bundled_recipes():
        lines = path.read_text(encoding="utf-8").splitlines()
        comment = " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))
        recipes.append({"name": recipe_name(path), "purpose": comment.split(". ")[0].rstrip(".")})
    return recipes
