"""Several methods with one budget: a result of each, in folders of one folder, to be compared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmsqueeze import __version__
from llmsqueeze.compress.job import model_name, open_job
from llmsqueeze.compress.quantize import quantize
from llmsqueeze.files import SIDECAR, read_json_if_there, write_json
from llmsqueeze.formats.folder import check_writable
from llmsqueeze.model.original import Source, locate
from llmsqueeze.parallel import processes
from llmsqueeze.progress import Progress
from llmsqueeze.recipe.resolve import make_recipe
from llmsqueeze.recipe.several import told_of

RUNS = "runs.json"  # in the folder of folders: method -> what the run that wrote its result was of


def quantize_each(
    source: Source,
    settings: Mapping[str, Mapping[str, Any]],
    root: Path | None,
    *,
    device: str = "auto",
    overwrite: bool = False,
    progress: Progress,
) -> list[str]:
    """A result of every method in `root`/<method>; returns the folders. One of the same model, text and
    settings is left there.

    Raises RecipeError for a budget that one of the methods cannot meet, and OutputError for a folder of another run,
    before any of them runs.
    """
    root = root or Path(f"{model_name(source)}-methods")
    runs = processes.of_first(lambda: read_json_if_there(root / RUNS))
    origin = processes.of_first(lambda: origin_of(source))
    about = {name: {**origin, "text": text_of(own), "settings": dict(own)} for name, own in settings.items()}
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


def origin_of(source: Source) -> dict[str, Any]:
    """What a result is of, beside its settings: the model's files, and the version."""
    path = locate(source.model)
    files = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".json"))
    return {"model": source.name, "files": {file.name: _identity(file) for file in files}, "llmsqueeze": __version__}


def text_of(settings: Mapping[str, Any]) -> dict[str, list[int]]:
    """The files of the calibration text, as far as it is in files."""
    named = (one.rpartition(":")[0] or one for one in str(settings.get("calibration") or "").split(","))
    whole = [Path(str(settings.get("calibration"))), *map(Path, named)]
    return {str(file): _identity(file) for file in whole if file.is_file()}


def _identity(file: Path) -> list[int]:
    """Size and time of a file, which change when it is written again."""
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns]
