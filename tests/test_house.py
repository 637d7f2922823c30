"""The house: the top level of the repository, sizes of folders, verbs, and the levels of imports between rooms."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

import grimp
import typer

from llmsqueeze.cli.app import app

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "llmsqueeze"
VERBS: tuple[str, ...] = tuple(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


@cache
def files() -> tuple[Path, ...]:
    """The files of the repository. Without a clone: the files of the folder."""
    try:
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        skipped = {"__pycache__", ".venv", "build", "runs", "llmsqueeze.egg-info"}
        paths = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
        return tuple(path for path in paths if not skipped & set(path.parts))
    return tuple(Path(line) for line in listed.splitlines())


def in_folder(folder: str) -> list[str]:
    return sorted(path.name for path in files() if path.parent == Path(folder))


def test_the_top_level_has_only_these() -> None:
    folders = {"llmsqueeze", "recipes", "evals", "tests", "findings"}
    documents = {"pyproject.toml", "README.md", "CHANGELOG.md", "Makefile"}
    visible = {path.parts[0] for path in files() if not path.parts[0].startswith(".")}
    assert visible - folders - documents - {"constraints.txt"} == set()
    assert documents <= visible


def test_folders_are_small() -> None:
    """At most 12 modules; in cli/ those of the verbs are not counted, and `__init__.py` nowhere."""
    assert len(in_folder("llmsqueeze")) <= 8, in_folder("llmsqueeze")
    verbs = {f"{verb}.py" for verb in VERBS}
    folders = {str(path.parent) for path in files() if path.parts[0] == "llmsqueeze" and path.suffix == ".py"}
    modules = {folder: [name for name in in_folder(folder) if name.endswith(".py")] for folder in folders}
    counted = {f: {*names} - {"__init__.py"} - (verbs if f.endswith("cli") else set()) for f, names in modules.items()}
    assert {folder: names for folder, names in counted.items() if len(names) > 12} == {}


def test_no_two_test_files_have_one_name() -> None:
    """pytest imports each under its bare name."""
    names = [path.name for path in files() if path.parts[0] == "tests" and path.name.startswith("test_")]
    assert sorted(names) == sorted(set(names))


def test_every_verb_is_a_file_of_its_name() -> None:
    assert len(VERBS) >= 11
    assert [verb for verb in VERBS if not (PACKAGE / "cli" / f"{verb}.py").is_file()] == []


def test_the_imports_between_rooms_have_at_most_12_levels() -> None:
    """The longest chain, from the imports in the code; import-linter checks their order."""
    graph = grimp.build_graph("llmsqueeze", cache_dir=None)
    rooms = graph.find_children("llmsqueeze")
    for room in rooms:
        if graph.find_children(room):
            graph.squash_module(room)
    below = {room: (graph.find_modules_directly_imported_by(room) & rooms) - {room} for room in rooms}

    @cache
    def levels(room: str) -> int:
        return 1 + max((levels(other) for other in below[room]), default=0)

    assert 2 < max(map(levels, rooms)) <= 12
