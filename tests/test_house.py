"""What lies at the top level of the repository."""

from __future__ import annotations

import subprocess
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "llmsqueeze"


def test_the_top_level_is_as_given() -> None:
    given = {"llmsqueeze", "recipes", "evals", "tests", "pyproject.toml", "README.md", "Makefile"}
    root = PACKAGE.parent
    try:  # what is in the repository: beside it may lie what the README's commands have written
        listed = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):  # no git, or no clone
        listed = "\n".join(path.name for path in root.iterdir())
    visible = {name for line in listed.splitlines() if not (name := line.split("/")[0]).startswith(".")}
    assert visible - {"llmsqueeze.egg-info", "build", "constraints.txt", "runs"} == given
