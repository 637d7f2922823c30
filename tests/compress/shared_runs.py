"""What test_shared_runs.py starts in several processes, and test_resume.py in one."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import typer

from llmsqueeze import journal
from llmsqueeze.cli.terminal import friendly
from llmsqueeze.compress.quantize import quantize
from llmsqueeze.model.original import Source
from llmsqueeze.parallel import processes


def shared_runs(out: Path, runs: Mapping[str, tuple[Path, dict[str, Any]]], step: str | None = None) -> None:
    """Each run, name -> model and settings, writes out/<name>. The last process kills itself when it has noted the
    step."""
    torch.set_num_threads(1)
    if step is not None:
        killed_after(step)
    try:
        with friendly(debug=False), processes.joined():
            for name, (model, settings) in runs.items():
                quantize(Source(str(model)), settings, out / name)
    except typer.Exit as ended:
        sys.exit(ended.exit_code)


def killed_after(step: str) -> None:
    note = journal._note

    def last(folder: Path, name: str, *rest: Any) -> None:
        note(folder, name, *rest)
        if name == step and processes.rank() == processes.count() - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    journal._note = last
