"""Imports go strictly downward, and methods never import each other."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "llmsqueeze"

# each file may import only from the layers below its own; `quantize` is one layer in which descent builds on gptq
LAYERS = [
    {"errors", "__init__", "demo", "rans_loops"},
    {"files", "progress", "memory", "curvature", "checks", "snippets", "public", "hub_errors", "rans"},
    {"bitpack", "frequencies", "activations", "checkpoint", "recipe", "calibrate", "output", "card_scores"},
    {"parts", "skeleton", "locate", "defaults", "fingerprint", "card"},
    {"plan", "blocks", "recipes", "rewrite"},
    {"observe", "quantize", "formats", "pictures", "ends"},
    {"hf", "checking"},
    {"sampling", "verification"},
    {"compensate"},
    {"price", "planfile"},
    {"allocate"},
    {"profile"},
    {"measure", "rounding"},
    {"decide", "prepare"},
    {"record", "reuse", "outlook", "groups"},
    {"outer"},
    {"compress", "show", "hub", "report"},
    {"scoreboard"},
    {"distillation", "page"},
    {"evaluate", "trial", "bnb", "rerounding"},
    {"planning", "search", "distilling", "exporting", "comparing"},
    {"run", "options", "terminal"},
    {"cli_results"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imported(file: Path) -> set[str]:
    """The llmsqueeze modules a file imports, anywhere in it, by their first name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "llmsqueeze":
            tail = (node.module or "").split(".")[1:]
            found |= {tail[0]} if tail else {alias.name for alias in node.names}
    return found


def test_imports_go_downward() -> None:
    upward = []
    for file in PACKAGE.rglob("*.py"):
        name = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        assert name in LEVEL, f"{name} has no layer; add it to LAYERS"
        if name in ("__init__",):
            continue
        for target in imported(file) - {name}:
            if target in LEVEL and LEVEL[target] >= LEVEL[name]:
                upward.append(f"{file.relative_to(PACKAGE)} imports {target}")
    assert upward == []


def test_the_top_level_is_as_given() -> None:
    given = {"llmsqueeze", "recipes", "evals", "tests", "pyproject.toml", "README.md", "Makefile"}
    root = PACKAGE.parent
    try:  # what is in the repository: beside it may lie what the README's commands have written
        listed = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):  # no git, or no clone
        listed = "\n".join(path.name for path in root.iterdir())
    visible = {name for line in listed.splitlines() if not (name := line.split("/")[0]).startswith(".")}
    assert visible - {"llmsqueeze.egg-info", "build", "constraints.txt", "runs"} == given
