"""Values as a public text may show them: no local path, no token; tables, sizes and YAML of a model card."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import PureWindowsPath
from typing import Any

TEXT_SUFFIXES = (".txt", ".json", ".jsonl", ".parquet", ".csv", ".tsv", ".md", ".gz", ".zst", ".raw")

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# how a path on a disk begins; a lone backslash does not count, skip patterns may hold one
ROOT = r"(?:file://)?(?:~[\w.-]*/|\.{1,2}/|/(?=\S)|[A-Za-z]:[\\/]|\\\\\w)"
LOCAL_PATH = re.compile(ROOT + ".*", re.DOTALL)
# the folders of a path inside a longer text; the double slash of a URL is none
INNER_FOLDERS = re.compile(rf"(?<![\w/\\.~*-])(?!//){ROOT}(?:[^\s/\\'\"]+[/\\])*")
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}")


def shown(value: Any) -> Any:
    """`value` fit for publication: every local path in it as its last component, Hub tokens blanked."""
    if isinstance(value, dict):
        return {key: shown(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [shown(item) for item in value]
    if not isinstance(value, str):
        return value
    text = TOKEN.sub("hf_...", value)
    is_file = "://" not in text and text.lower().endswith(TEXT_SUFFIXES) and not re.search(r"\s", text)
    if is_file or LOCAL_PATH.fullmatch(text):
        # Windows rules split at both kinds of slash
        return PureWindowsPath(text).name
    return INNER_FOLDERS.sub("", text)


def is_hub_id(model: str) -> bool:
    """Whether `model` reads as owner/name; a folder of that name is not looked for."""
    return HUB_ID.fullmatch(model) is not None


def slug(text: str) -> str:
    """`text` in lower case, everything but letters and digits as single hyphens: 'wikitext-2-test'."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def human_bytes(count: int) -> str:
    """`count` in decimal units (1 GB = 10^9 bytes), with the exact number beside it."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit} ({count:,} bytes)"
    return f"{count} bytes"


def is_number(value: Any) -> bool:
    """A finite int or float; JSON written by Python may also hold NaN and infinities."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any) -> str:
    """Four digits; a dash for what was not measured."""
    return f"{value:.4g}" if is_number(value) else "–"


def with_error(value: Any, error: Any) -> str:
    """`number`, with its standard error where there is one."""
    return number(value) + (f" ± {number(error)}" if is_number(value) and is_number(error) else "")


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A Markdown table; the first column to the left, all others to the right."""
    lines = [header, (":--", *["--:"] * (len(header) - 1)), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def yaml_text(value: Any) -> str:
    """`value` as YAML, in its own order."""
    import yaml

    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True))
