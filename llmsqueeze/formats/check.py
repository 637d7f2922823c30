"""The verb `check`: whether a compressed folder is complete and sound, and which runtimes open it; no model is run.

Errors make the folder unusable; obstacles bar single runtimes. Every tensor is read once (inspection/reading.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmsqueeze import parts
from llmsqueeze.errors import CheckpointError, RecipeError, SqueezeError, UnsupportedError
from llmsqueeze.files import ADAPTER_WEIGHTS, SIDECAR
from llmsqueeze.formats.entries import DENSE, FORMATS, Entry, format_of
from llmsqueeze.formats.exports import gguf_map, peft
from llmsqueeze.formats.inspection.damage import (
    CHANGED,
    COMPRESSED,
    EDITED,
    changed_config,
    refuse_damaged,
    without_checksums,
)
from llmsqueeze.formats.inspection.reading import RUNTIMES, Findings, Reading
from llmsqueeze.formats.inspection.runtimes import add_obstacles
from llmsqueeze.formats.opened import Folder, open_folder
from llmsqueeze.formats.record import read_record
from llmsqueeze.model.checkpoint import Checkpoint, open_checkpoint
from llmsqueeze.model.tensors.sources import find_sources
from llmsqueeze.model.tensors.ties import settle
from llmsqueeze.recipe.values import choice


def check(folder: str, runtime: str | None = None, trust_remote_code: bool = False) -> dict[str, Any]:
    """Checks the folder. `state`: sound, not sound, or that this command cannot tell, and why (`unknown`). `verdicts`:
    for each runtime (or the one asked for) why it does not open it, "" if it should.

    Raises RecipeError if there is no such folder or runtime.
    """
    if runtime is not None:
        runtime = choice(RUNTIMES)("target", runtime)
    path = Path(folder)
    if not path.is_dir():
        raise RecipeError(f"{path} is no folder; check looks at one that llmsqueeze wrote")
    findings, form, unknown = Findings(), "unknown", ""
    try:
        recorded = read_record(path).get("format")
        if recorded == peft.FORMAT:
            findings.notes.append(f"looked at the base; the adapter in {peft.ADAPTER} belongs to it")
            refuse_damaged([path / peft.ADAPTER / ADAPTER_WEIGHTS])
            path = path / peft.BASE
        if recorded == gguf_map.FORMAT:
            raise UnsupportedError(
                f"{path} holds a plan for llama.cpp and no weights; quantize.sh in it makes the model"
            )
        checkpoint = open_checkpoint(path)
        form = format_of(checkpoint)
        refuse_other_tools(checkpoint)
        examine(open_folder(checkpoint, trust_remote_code), findings)
    except UnsupportedError as error:
        unknown = str(error)
    except SqueezeError as error:
        findings.errors.append(str(error))
    if path.resolve().name.endswith(".partial"):
        findings.notes.append("a folder of this name is left by a run that did not end well")
    verdicts = dict.fromkeys(RUNTIMES, f"not known: {unknown}") if unknown else findings.verdicts()
    return {
        "folder": folder,
        "format": form,
        "sound": not findings.errors and not unknown,
        "state": "cannot tell" if unknown else "not sound" if findings.errors else "sound",
        "unknown": unknown,
        "errors": findings.errors,
        "verdicts": {runtime: verdicts[runtime]} if runtime else verdicts,
        "notes": findings.notes,
    }


def refuse_other_tools(checkpoint: Checkpoint) -> None:
    """Raises UnsupportedError for a format that llmsqueeze does not write."""
    form = format_of(checkpoint)
    if form not in (*FORMATS, DENSE):
        raise UnsupportedError(
            f"{checkpoint.path} is in {form}, another tool's format; check knows {', '.join(FORMATS)} and {DENSE}"
        )


def examine(folder: Folder, findings: Findings) -> None:
    """Adds the errors and obstacles of the folder."""
    if folder.format == DENSE and not folder.record:
        findings.errors += original_errors(folder, findings)
    else:
        findings.errors += form_errors(folder)
    if not findings.errors:
        reading = Reading(folder)
        reading.rest()
        findings.errors += reading.errors
        add_changes(folder, findings)
    add_obstacles(folder, findings)


def add_changes(folder: Folder, findings: Findings) -> None:
    """Adds what the checksums of config.json tell, and a note if there are none of tensors that llmsqueeze wrote."""
    changed = changed_config(folder.path)
    if changed == COMPRESSED:
        findings.errors.append(CHANGED)
    elif changed:
        findings.notes.append(EDITED)
    if folder.record and (lacking := without_checksums(folder.checkpoint)):
        findings.notes.append(lacking)


def original_errors(folder: Folder, findings: Findings) -> Iterator[str]:
    """The errors of a model that llmsqueeze did not write: its names are those that transformers reads."""
    settled, _ = settle(folder.model, find_sources(folder.model, folder.checkpoint), folder.checkpoint)
    tied: Any = folder.model.all_tied_weights_keys
    for name, tensor in folder.model.state_dict().items():
        source = settled.get(tied.get(name, name)) or settled.get(name)
        if source is None:
            yield f"{name} is missing"
        elif source.shape != tuple(tensor.shape):
            yield f"{name} is {list(source.shape)}; the model needs {list(tensor.shape)}"
    used = {name for source in settled.values() for name in source.names}
    if unused := sorted(set(folder.checkpoint.tensors) - used - set(tied)):
        findings.notes.append(f"{len(unused)} tensors, among them {unused[0]}, are not part of the model")
    yield from size_errors(folder)


def form_errors(folder: Folder) -> list[str]:
    """The errors that headers and config show: names, shapes, dtypes, sizes."""
    return [*misfits(folder), *unexplained(folder), *size_errors(folder)]


def refuse_misfits(folder: Folder) -> None:
    """Raises CheckpointError for a folder that lacks a tensor, or has one in another shape: before any is read, and
    before anything is made by the numbers in its config."""
    if error := next(misfits(folder), None):
        raise CheckpointError(f"{folder.path}: {error}; `llmsqueeze check` lists all errors")


def misfits(folder: Folder) -> Iterator[str]:
    """The tensors that config and model need, and that are not there in their shape and dtype."""
    model: Any = folder.model
    tied = set(model.all_tied_weights_keys) | set(model.all_tied_weights_keys.values())
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for linear, entry in folder.entries.items():
        shape = shapes.pop(f"{linear}.weight", None)
        if shape is None:
            yield f"the config names {linear}, which the model does not have"
        elif entry.shape not in (shape, shape[::-1]):  # Conv1D stores its weight transposed
            yield f"{linear} is {list(entry.shape)}; the model needs {list(shape)}"
        yield from layout_errors(folder.checkpoint, entry)
    for name, size in shapes.items():
        stored = folder.checkpoint.tensors.get(name)
        if stored is None and name not in tied:
            yield f"{name} is missing"
        elif stored is not None and stored.shape != size:
            yield f"{name} is {list(stored.shape)}; the model needs {list(size)}"


def unexplained(folder: Folder) -> Iterator[str]:
    """The tensors that neither config nor model need."""
    compressed = {f"{linear}.weight" for linear in folder.entries}
    expected = set(folder.model.state_dict()) - compressed | {
        name for entry in folder.entries.values() for name in entry.tensors
    }
    for name in sorted(set(folder.checkpoint.tensors) - expected):
        yield f"{name} is explained by nothing in the config"


def layout_errors(checkpoint: Checkpoint, entry: Entry) -> Iterator[str]:
    """The tensors of a compressed linear are there as `parts.layout` says."""
    for spec, names in zip(entry.specs, entry.names, strict=True):
        for kind, (size, dtype) in parts.layout(entry.shape, spec).items():
            stored = checkpoint.tensors.get(names[kind])
            if stored is None:
                yield f"{names[kind]} is missing"
            elif stored.shape != size or stored.dtype != dtype:
                yield (
                    f"{names[kind]} is {list(stored.shape)} {parts.dtype_name(stored.dtype)}; the config says "
                    f"{list(size)} {parts.dtype_name(dtype)}"
                )


def size_errors(folder: Folder) -> Iterator[str]:
    """Counted bytes are the bytes on disk: of every file, and of the folder's record of itself."""
    checkpoint, recorded = folder.checkpoint, folder.record.get("nbytes")
    for file in sorted({stored.file for stored in checkpoint.tensors.values()}):
        counted = sum(stored.nbytes for stored in checkpoint.tensors.values() if stored.file == file)
        with file.open("rb") as stream:
            header = 8 + int.from_bytes(stream.read(8), "little")
        if file.stat().st_size != header + counted:
            yield f"{file.name} has {file.stat().st_size} bytes; its tensors and header take {header + counted}"
    if recorded is not None and recorded != checkpoint.nbytes:
        yield f"{SIDECAR} says {recorded} bytes of weights; there are {checkpoint.nbytes}"
