"""Several methods with one budget: a result of each, in folders of one folder, to be compared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmsqueeze.compress.job import model_name, open_job
from llmsqueeze.compress.quantize import quantize
from llmsqueeze.files import SIDECAR, read_json_if_there, write_json
from llmsqueeze.formats.folder import check_writable
from llmsqueeze.model.original import Source
from llmsqueeze.parallel import processes
from llmsqueeze.progress import Progress
from llmsqueeze.recipe.resolve import make_recipe
from llmsqueeze.recipe.several import told_of

RUNS = "runs.json"  # in the folder of folders: method -> the settings of the run that wrote its result


def quantize_each(
    source: Source,
    settings: Mapping[str, Mapping[str, Any]],
    root: Path | None,
    *,
    device: str = "auto",
    overwrite: bool = False,
    progress: Progress,
) -> list[str]:
    """A result of every method in `root`/<method>; returns the folders. One that the same settings made is left there.

    Raises RecipeError for a budget that one of the methods cannot meet, and OutputError for a folder of another run,
    before any of them runs.
    """
    root = root or Path(f"{model_name(source)}-methods")
    runs = processes.of_first(lambda: read_json_if_there(root / RUNS))
    about = {name: {"model": source.name, **own} for name, own in settings.items()}
    there = {name for name in about if runs.get(name) == about[name] and (root / name / SIDECAR).exists()}
    missing = {name: own for name, own in settings.items() if overwrite or name not in there}
    for name, own in missing.items():
        with told_of(name):
            check_writable(root / name, overwrite)
            open_job(source, make_recipe(own), Progress(), text=False).target()
    for number, (name, own) in enumerate(settings.items(), 1):
        if name not in missing:
            progress.note(f"{root / name} is there, by the same settings (--overwrite makes it again)")
            continue
        progress.note(f"{name}, {number} of {len(settings)}")
        with told_of(name):
            quantize(source, own, root / name, device=device, overwrite=overwrite, progress=progress)
        if processes.first():
            runs[name] = about[name]
            write_json(root / RUNS, runs)
    return [str(root / name) for name in settings]
