"""Values without local paths and tokens, so that they can be published."""

from __future__ import annotations

import re
from pathlib import PureWindowsPath
from typing import Any

TEXT_SUFFIXES = (
    *(".txt", ".text", ".md", ".raw", ".json", ".jsonl", ".ndjson", ".parquet", ".arrow", ".csv", ".tsv"),
    *(".gz", ".zst", ".xz", ".bz2"),
)

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# the start of a path on a disk; not a single backslash, because a skip pattern may have one
ROOT = r"(?:file://)?(?:~[\w.-]*/|\.{1,2}/|/(?=\S)|[A-Za-z]:[\\/]|\\\\\w)"
LOCAL_PATH = re.compile(ROOT + ".*", re.DOTALL)
# the folders of a path inside a longer text; not the double slash of a URL
INNER_FOLDERS = re.compile(rf"(?<![\w/\\.~*-])(?!//){ROOT}(?:[^\s/\\'\"]+[/\\])*")
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}")


def shown(value: Any) -> Any:
    """`value` fit for publication: each local path is cut to its last component, each Hub token is blanked.

    This applies to the keys of a dict too.
    """
    if isinstance(value, dict):
        return {shown(key): shown(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [shown(item) for item in value]
    if not isinstance(value, str):
        return value
    text = TOKEN.sub("hf_...", value)
    is_file = "://" not in text and text.lower().endswith(TEXT_SUFFIXES) and not re.search(r"\s", text)
    if is_file or LOCAL_PATH.fullmatch(text):
        # the rules of Windows split at both kinds of slash
        return PureWindowsPath(text).name
    return INNER_FOLDERS.sub("", text)


def is_hub_id(model: str) -> bool:
    """Whether `model` has the form owner/name. A folder of that name makes no difference."""
    return HUB_ID.fullmatch(model) is not None
