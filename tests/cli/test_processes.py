"""Facts that need a process of their own: imports at the start, and an interruption."""

from __future__ import annotations

import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path


def test_help_needs_neither_torch_nor_transformers() -> None:
    watch = (
        "import sys; sys.argv = ['llmsqueeze', '--help']\n"
        "from llmsqueeze.cli.app import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = 'torch transformers numpy datasets accelerate lm_eval bitsandbytes matplotlib'.split()\n"
        "print('HEAVY', sorted(set(heavy) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", watch], capture_output=True, text=True, check=True)
    assert "HEAVY []" in done.stdout
    for verb in ("quantize", "plan", "eval", "show", "push", "recipes"):
        assert verb in done.stdout


def test_ctrl_c_leaves_no_result(tmp_path: Path) -> None:
    """A real process, really interrupted while it compresses."""
    few = ["--samples", "2", "--seq-len", "32"]
    command = [sys.executable, "-u", "-m", "llmsqueeze.cli", "quantize", "demo", *few, "--out"]
    command.append(str(tmp_path / "out"))

    def listen() -> None:
        """What a shell starts in the background ignores Ctrl-C, and so would its children."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True, preexec_fn=listen) as process:
        assert process.stderr is not None
        assert process.stdout is not None
        log = tmp_path / "out.partial" / "run.jsonl"
        while process.poll() is None and not (log.exists() and "q_proj" in log.read_text()):
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.1)
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        out = process.stdout.read()
    assert process.returncode == 130, rest
    assert "interrupted; what was done is kept in" in " ".join(rest.split())
    assert f"this goes on from there: llmsqueeze quantize demo {' '.join(few)} --out {tmp_path / 'out'}" in rest
    assert "Traceback" not in rest
    assert out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
