"""Text in local files: plain, or rows that the library datasets reads. Files may be compressed."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from lzma import LZMAError
from pathlib import Path
from typing import Any

from llmsqueeze.errors import CalibrationError, foreign
from llmsqueeze.errors import first_line as said_by
from llmsqueeze.text.chat import conversation
from llmsqueeze.text.data_sets import quiet
from llmsqueeze.text.document import Text
from llmsqueeze.text.fields import CHATS, PAIRS, TEXTS, Row, text_of

BUILDERS = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow"}  # ending -> reader of datasets
JSON = (".jsonl", ".ndjson", ".json")
ROWS = (*JSON, *BUILDERS)  # endings of files of rows; all other files are plain text
PLAIN = (".txt", ".text", ".md", ".raw")  # of plain text, where a folder has other files too
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".xz": "xz", ".bz2": "bz2"}
LOOKED_AT = 1 << 20  # characters
NAME = re.compile(r"[^\W\d][^.!?]*")  # of a column: neither a sentence nor a number
LONGEST_NAME, MOST_WORDS = 40, 5
KNOWN = {*TEXTS, *CHATS, *(name for pair in PAIRS for name in pair)}


def read_file(path: Path, field: str | None, enough: int | None) -> Text:
    """A local file, until `enough` characters are read. Raises CalibrationError if it has no text."""
    check_compression(path)
    if ending(path) in ROWS:
        text = text_of(rows_in(path), path.name, field, enough)
        return replace(text, notes=(*filter(None, [note_on_header(path)]), *text.notes))
    content = read_plain(path, enough)
    if (kind := disguised(content)) is None:
        if not content.strip():
            raise CalibrationError(f"{path} is empty")
        return Text(path.name, (content,), plain=True)
    text = text_of(rows_in(path, kind), path.name, field, enough)
    what = "JSON" if kind in JSON else "a table"
    return replace(text, notes=(f"{path.name} looks like {what} and is read as such", *text.notes))


def rows_in_plain(path: Path, enough: int | None) -> Iterator[Row]:
    """A file of plain text as a row; the rows of one that is JSON or a table."""
    content = read_plain(path, enough)
    kind = disguised(content)
    yield from [{"text": content}] if kind is None else rows_in(path, kind)


def ending(path: Path) -> str:
    """The ending that says what is in a file, without that of its compression."""
    kind = path.suffix.lower()
    return Path(path.stem).suffix.lower() if kind in COMPRESSIONS else kind


def check_compression(path: Path) -> None:
    """Raises CalibrationError if a package is missing that reads a compression."""
    if path.suffix.lower() == ".zst" and not importlib.util.find_spec("zstandard"):
        raise CalibrationError(f"{path} is compressed by zstd, which needs a package: pip install zstandard")


def opened(path: Path) -> Any:
    """The text of a file that may be compressed, for a `with` block."""
    import fsspec

    return fsspec.open(str(path), "rt", encoding="utf-8-sig", compression=COMPRESSIONS.get(path.suffix.lower()))


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """In the context errors of reading are CalibrationErrors that name the file."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not text: byte {error.start} is not UTF-8") from error
    except (OSError, EOFError, ValueError, LZMAError, zlib.error) as error:
        raise CalibrationError(f"cannot read {path}: {said_by(error)}") from error


def read_plain(path: Path, enough: int | None) -> str:
    """The first `enough` characters of a file, or all. Raises CalibrationError if it is not text."""
    with readable(path), opened(path) as file:
        content: str = file.read(-1 if enough is None else max(enough, LOOKED_AT))
    if "\0" in content[:LOOKED_AT]:
        raise CalibrationError(f"{path} is not text: it contains NUL bytes")
    return content


def disguised(content: str) -> str | None:
    """The ending that a text should have which is JSON or a table; None if it is plain text."""
    lines = content[:LOOKED_AT].lstrip().splitlines()[:2]
    if lines and lines[0].startswith("{") and all(_is_mapping(line) for line in lines):
        return ".jsonl"
    if lines and re.match(r"\[\s*($|[{\"])", lines[0]):
        try:
            return ".json" if isinstance(json.loads(content), list) else None
        except (ValueError, RecursionError):
            return None
    for kind, separator in ((".csv", ","), (".tsv", "\t")):
        columns = [next(csv.reader([line], delimiter=separator), []) for line in lines]
        if len(columns) == 2 and 1 < len(columns[0]) == len(columns[1]) and _is_header(columns[0]):
            return kind
    return None


def _is_header(columns: list[str]) -> bool:
    """Whether they are names of fields, one of them known as that of a text."""
    return all(re.fullmatch(r"[A-Za-z_][\w-]*", name) for name in columns) and bool(KNOWN & {*columns})


def _is_mapping(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def rows_in(path: Path, kind: str | None = None) -> Iterator[Row]:
    """The rows of a file, one after the other. kind: the ending by which it is read. Raises CalibrationError."""
    kind = kind or ending(path)
    return json_rows(path) if kind in JSON else table_rows(path, kind)


def table_rows(path: Path, kind: str) -> Iterator[Row]:
    """The rows of a table, by datasets."""
    import datasets

    options: dict[str, Any] = {}
    if BUILDERS[kind] == "csv":  # 'NA' and 'None' in a table are words
        options = {"keep_default_na": False, "sep": "\t" if kind == ".tsv" else separator(path)}
        if count := unnamed_columns(first_line(path, kind)):
            options |= {"header": None, "names": [f"column {number}" for number in range(1, count + 1)]}
    with quiet(), foreign(CalibrationError, f"{path} cannot be read"):
        try:
            yield from datasets.load_dataset(
                BUILDERS[kind], data_files=str(path.resolve()), split="train", streaming=True, **options
            )
        except StopIteration as error:  # how datasets find a file without rows
            raise CalibrationError(f"{path} is empty") from error


def separator(path: Path) -> str:
    """What stands between the columns of a csv file: a comma, or what stands between the names in its first line."""
    with readable(path), opened(path) as file:
        line = file.readline(LOOKED_AT)
    names = r'"?\w[\w ]*"?'
    return next((one for one in ";\t|" if re.fullmatch(rf"{names}(?:{re.escape(one)}{names})+\s*", line)), ",")


def unnamed_columns(first: list[str]) -> int:
    """How many columns a table has whose first line does not name them; 0 if it does.

    It does if one of them is known; or if all are names by their looks, no two alike. One may be empty, as pandas
    leaves that of its index.
    """
    looks = all(is_name(cell) for cell in first if cell) and len({*first}) == len(first)
    return 0 if looks or KNOWN & {*first} else len(first)


def first_line(path: Path, kind: str) -> list[str]:
    """The cells of the first line of a table. Raises CalibrationError for an empty file."""
    with readable(path), opened(path) as file, foreign(CalibrationError, f"{path} cannot be read"):
        lines = csv.reader(file, delimiter="\t" if kind == ".tsv" else separator(path))
        if (first := next((line for line in lines if any(line)), None)) is None:
            raise CalibrationError(f"{path} is empty")
    return first


def is_name(cell: str) -> bool:
    """Whether a cell of a table may name its column, by its looks."""
    return len(cell) <= LONGEST_NAME and len(cell.split()) <= MOST_WORDS and bool(NAME.fullmatch(cell.strip()))


def note_on_header(path: Path) -> str:
    """What a user should know of the names of a table's columns: that it has none, or that they might be none; empty
    if one is known, and for other files."""
    kind = ending(path)
    if BUILDERS.get(kind) != "csv" or KNOWN & {*(first := first_line(path, kind))}:
        return ""
    if count := unnamed_columns(first):
        names = "column 1" if count == 1 else f"column 1 to column {count}"
        return f"{path.name} has no line with the names of its columns: they are called {names}"
    return f"{path.name}: its first line, {', '.join(first)!r}, is taken for the names of its columns"


def json_rows(path: Path) -> Iterator[Row]:
    """The rows of a list, of lines, or of the only list of rows in an object.

    By Python's own reader: that of datasets takes all rows for rows of one table, and ends the process at some files
    that are none.
    """
    with readable(path), opened(path) as file:
        begins = file.read(LOOKED_AT).lstrip()[:1]
    lines = ending(path) != ".json" and begins != "["
    if not lines:
        with readable(path), opened(path) as file:
            content = file.read()
        try:
            yield from _rows_of(json.loads(content), path)
            return
        except (ValueError, RecursionError) as error:  # lines under the name of a list, or a list in each line
            if (begins == "[" and "Extra data" not in str(error)) or "\n" not in content.strip():
                raise CalibrationError(f"{path} is not JSON: {said_by(error)}") from error
    with readable(path), opened(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _row(line, path, number)


def _rows_of(value: Any, path: Path) -> list[Row]:
    """The rows that a JSON value holds."""
    if isinstance(value, dict):
        lists = [one for one in value.values() if isinstance(one, list) and one and isinstance(one[0], dict)]
        is_row = any(isinstance(value.get(name), str) for name in TEXTS) or any(conversation(one) for one in lists)
        value = lists[0] if len(lists) == 1 and not is_row else _rows_of_columns(value) or [value]
    if not isinstance(value, list):
        raise CalibrationError(f"{path} holds no rows: it is neither a list nor an object")
    return [value_row(row) for row in value]


def _rows_of_columns(value: dict[str, Any]) -> list[Row]:
    """The rows of a table that an object holds column by column: `{"text": ["one", "two"], "id": [1, 2]}`, or
    `{"text": {"0": "one", "1": "two"}}` as pandas writes it; none if it is none."""
    numbered = {
        name: column for name, column in value.items() if isinstance(column, dict) and all(map(str.isdigit, column))
    }
    columns = {name: [*column.values()] for name, column in numbered.items()}
    columns |= {name: column for name, column in value.items() if isinstance(column, list)}
    texts = any(isinstance(one, str) or conversation(one) for column in columns.values() for one in column[:1])
    if not texts or len(columns) < len(value) or len({len(column) for column in columns.values()}) != 1:
        return []
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def value_row(value: Any) -> Row:
    """A row of which only the value is there: a chat, or a text."""
    if isinstance(value, dict):
        return value
    return {"messages" if isinstance(value, list) and conversation(value) else "text": value}


def _row(line: str, path: Path, number: int) -> Row:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{path} line {number} is not JSON") from error
    return value_row(value)
