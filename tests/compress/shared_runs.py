"""What test_shared_runs.py starts in several processes: `shared_runs.py OUT RUNS [STEP]`.

RUNS: JSON, name -> model, settings; each run writes OUT/<name>. STEP: the last process kills itself when it has noted
it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import typer
from transformers.utils import logging

from llmsqueeze import journal
from llmsqueeze.cli.terminal import friendly
from llmsqueeze.compress.quantize import quantize
from llmsqueeze.model.original import Source
from llmsqueeze.parallel import processes


def killed_after(step: str) -> None:
    note = journal._note

    def last(folder: Path, name: str, *rest: Any) -> None:
        note(folder, name, *rest)
        if name == step and processes.rank() == processes.count() - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    journal._note = last


def main(out: str, runs: str, step: str | None = None) -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if step is not None:
        killed_after(step)
    with friendly(debug=False), processes.joined():
        for name, (model, settings) in json.loads(runs).items():
            quantize(Source(model), settings, Path(out) / name)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except typer.Exit as ended:
        sys.exit(ended.exit_code)
