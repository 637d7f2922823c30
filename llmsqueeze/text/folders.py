"""A folder of data: one that datasets saved, or files of rows, which are read as single files are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmsqueeze.errors import CalibrationError, foreign, nearest
from llmsqueeze.text.data_sets import quiet
from llmsqueeze.text.document import Text
from llmsqueeze.text.fields import Row, text_of
from llmsqueeze.text.files import PLAIN, ROWS, ending, note_on_header, rows_in, rows_in_plain

SAVED = ("dataset_dict.json", "state.json")  # what `save_to_disk` leaves


def read_folder(path: Path, config: str | None, split: str, named: bool, field: str | None, enough: int | None) -> Text:
    """A folder that `save_to_disk` wrote, or one of data files. named: whether the user named the split.

    Raises CalibrationError if it is neither.
    """
    import datasets

    source = " ".join([path.name, *([config] if config else []), *([split] if named else [])])
    with quiet(), foreign(CalibrationError, f"{path} is a folder that datasets cannot read"):
        if any((path / name).is_file() for name in SAVED):
            data: Any = datasets.load_from_disk(str(path))
            rows = data[split_of(data, split, named, source)] if isinstance(data, Mapping) else data
            return text_of(rows, source, field, enough)
        builder = datasets.load_dataset_builder(str(path.resolve()), config)
        if (files := files_by_split(builder)) is None:
            data = builder.as_streaming_dataset()
            return text_of(data[split_of(data, split, named, source)], source, field, enough)
        chosen = files[split_of(files, split, named, source)]
        text = text_of(rows_of(chosen, enough), source, field, enough)
        notes = [*map(note_on_header, chosen), "" if config else note_on_unread(path, files)]
        return replace(text, notes=(*filter(None, notes), *text.notes))


def files_by_split(builder: Any) -> dict[str, list[Path]] | None:
    """The files of every split, as datasets tells them by their names; None if they are not all rows or plain text."""
    files = {str(split): [Path(file) for file in names] for split, names in (builder.config.data_files or {}).items()}
    kinds = {ending(file) for names in files.values() for file in names}
    return files if kinds and kinds <= {*ROWS, *PLAIN} else None


def note_on_unread(path: Path, files: Mapping[str, Sequence[Path]]) -> str:
    """What a user should know of files of rows or text that datasets passes over: it takes those of one kind."""
    read = {file.resolve() for names in files.values() for file in names}
    kinds = {*ROWS, ".txt"}
    seen = (name for name in path.rglob("*") if not any(part.startswith(".") for part in name.relative_to(path).parts))
    unread = sorted(name.name for name in seen if ending(name) in kinds and name.resolve() not in read)
    if not unread:
        return ""
    names = f"{unread[0]} is" if len(unread) == 1 else f"{unread[0]} and {len(unread) - 1} more are"
    return f"of the folder {path.name} {names} not read: datasets takes the files of one kind"


def rows_of(files: Sequence[Path], enough: int | None) -> Iterator[Row]:
    """The rows of files, one after the other; a file of plain text is a row."""
    for file in files:
        yield from rows_in(file) if ending(file) in ROWS else rows_in_plain(file, enough)


def split_of(names: Iterable[str], split: str, named: bool, source: str) -> str:
    """The split to read; if nobody named it, the only one, or train if there are several.

    Raises CalibrationError if there is none such.
    """
    names = list(names)
    if split not in names and not named:
        split = names[0] if len(names) == 1 else "train"
    if split not in names:
        raise CalibrationError(
            f"{source} has no split {split!r}{nearest(split, names)} (it has: {', '.join(names)}; write the name of "
            "one behind the folder, as in folder::split)"
        )
    return split
