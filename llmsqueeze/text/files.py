"""Text in local files: plain, or rows that the library datasets reads. Files may be compressed."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from llmsqueeze.errors import CalibrationError, first_line, foreign
from llmsqueeze.text.data_sets import quiet
from llmsqueeze.text.document import Text
from llmsqueeze.text.fields import PAIRS, TEXTS, Row, text_of

BUILDERS = {  # ending -> what reads it in datasets; all other files are plain text
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
# 'NA' and 'None' in a table are words; datasets would read the logs of some programs in a way of its own
OPTIONS: dict[str, dict[str, Any]] = {"csv": {"keep_default_na": False}, "json": {"parse_agent_traces": False}}
LINES = (".jsonl", ".ndjson")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".xz": "xz", ".bz2": "bz2"}
LOOKED_AT = 1 << 20  # characters


def read_file(path: Path, field: str | None, enough: int | None) -> Text:
    """A local file, until `enough` characters are read. Raises CalibrationError if it has no text."""
    check_compression(path)
    if (kind := ending(path)) in BUILDERS:
        return text_of(rows_in(path, BUILDERS[kind], {}), path.name, field, enough)
    content = read_plain(path, enough)
    builder, options = disguised(content)
    if not builder:
        if not content.strip():
            raise CalibrationError(f"{path} is empty")
        return Text(path.name, (content,))
    text = text_of(rows_in(path, builder, options), path.name, field, enough)
    what = {"json": "JSON", "csv": "a table"}[builder]
    return replace(text, notes=(f"{path.name} looks like {what} and is read as such", *text.notes))


def ending(path: Path) -> str:
    """The ending that says what is in a file, without that of its compression."""
    kind = path.suffix.lower()
    return Path(path.stem).suffix.lower() if kind in COMPRESSIONS else kind


def check_compression(path: Path) -> None:
    """Raises CalibrationError if a package is missing that reads a compression."""
    if path.suffix.lower() == ".zst" and not importlib.util.find_spec("zstandard"):
        raise CalibrationError(f"{path} is compressed by zstd, which needs a package: pip install zstandard")


def read_plain(path: Path, enough: int | None) -> str:
    """The first `enough` characters of a file, or all. Raises CalibrationError if it is not text."""
    import fsspec

    opened = fsspec.open(str(path), "rt", encoding="utf-8-sig", compression=COMPRESSIONS.get(path.suffix.lower()))
    try:
        with opened as file:
            content: str = file.read(-1 if enough is None else max(enough, LOOKED_AT))
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not text: byte {error.start} is not UTF-8") from error
    except (OSError, EOFError, ValueError) as error:
        raise CalibrationError(f"cannot read {path}: {first_line(error)}") from error
    if "\0" in content[:LOOKED_AT]:
        raise CalibrationError(f"{path} is not text: it contains NUL bytes")
    return content


def disguised(content: str) -> tuple[str, dict[str, Any]]:
    """What reads a text that is JSON or a table under another name, and its options; "" if it is plain text."""
    lines = content[:LOOKED_AT].lstrip().splitlines()[:2]
    if lines and lines[0].startswith("{") and all(_is_mapping(line) for line in lines):
        return "json", {}
    if lines and re.match(r"\[\s*($|[{\"])", lines[0]):
        try:
            return ("json", {}) if isinstance(json.loads(content), list) else ("", {})
        except (ValueError, RecursionError):
            return "", {}
    known = {*TEXTS, *(name for pair in PAIRS for name in pair)}
    for separator in (",", "\t"):
        columns = [next(csv.reader([line], delimiter=separator), []) for line in lines]
        if len(columns) == 2 and 1 < len(columns[0]) == len(columns[1]) and _is_header(columns[0], known):
            return "csv", {"sep": separator}
    return "", {}


def _is_header(columns: list[str], known: set[str]) -> bool:
    """Whether they are names of fields, one of them `known` as that of a text."""
    return all(re.fullmatch(r"[A-Za-z_][\w-]*", name) for name in columns) and bool(known & set(columns))


def _is_mapping(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def rows_in(path: Path, builder: str, options: dict[str, Any]) -> Iterator[Row]:
    """The rows of a file, one after the other. Raises CalibrationError with the reason of datasets."""
    import datasets

    options = {**OPTIONS.get(builder, {}), **({"sep": "\t"} if ".tsv" in path.suffixes else {}), **options}
    with quiet(), foreign(CalibrationError, f"{path} cannot be read"):
        try:
            yield from datasets.load_dataset(
                builder, data_files=str(path.resolve()), split="train", streaming=True, **options
            )
        except StopIteration as error:  # how datasets find a file without rows
            raise CalibrationError(f"{path} is empty") from error
        except Exception as error:
            if ending(path) in LINES and (line := broken_line(path)) is not None:
                raise CalibrationError(f"{path} line {line} is not JSON") from error
            raise


def broken_line(path: Path) -> int | None:
    """The number of the first line that is not JSON, if the lines before it are."""
    try:
        for number, line in enumerate(_lines(path), 1):
            if line.strip():
                try:
                    json.loads(line)
                except (ValueError, RecursionError):
                    return number
    except (OSError, EOFError, ValueError):
        return None
    return None


def _lines(path: Path) -> Iterable[str]:
    import fsspec

    file: TextIO
    with fsspec.open(str(path), "rt", encoding="utf-8-sig", compression=COMPRESSIONS.get(path.suffix.lower())) as file:
        yield from file
