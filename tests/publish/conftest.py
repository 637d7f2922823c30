"""Fixtures for card and push: a compressed folder that tells of another model, and a Hub on this machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_folder import SIDECAR, TOKEN, write_json
from hub_server import Hub, serve


@pytest.fixture(scope="session")
def make_folder(compressed: Callable[[str], Path]) -> Callable[..., Path]:
    """(path, changes of its record) -> a sound compressed folder whose record tells of a large model."""

    def make(path: Path, **changes: Any) -> Path:
        shutil.copytree(compressed("native"), path)
        record = json.loads((path / "llmsqueeze.json").read_text(encoding="utf-8"))
        kept = {key: record[key] for key in ("format", "nbytes", "bits_per_weight", "errors")}
        write_json(path / "llmsqueeze.json", SIDECAR | kept | changes)
        return path

    return make


@pytest.fixture
def folder(tmp_path: Path, make_folder: Callable[..., Path]) -> Path:
    return make_folder(tmp_path / "Llama-3.1-8B-3bit")


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve() as running:
        running.token = TOKEN
        yield running
