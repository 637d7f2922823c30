"""GPTQ of llm-compressor, for `speed.py`. Runs in an environment of its own.

    PEER_ENV/bin/python evals/speed_peer.py JOB.json

JOB.json: model, tokens (the rows), out (the folder to write).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from peer_tools import llmcompressor


def main() -> None:
    """GPTQ of llm-compressor with its defaults, in float32; writes the packed folder."""
    job = json.loads(Path(sys.argv[1]).read_text())
    seconds = llmcompressor(job["model"], job["tokens"], Path(job["out"]), modifier="gptq", bits=3, group_size=64)
    print(json.dumps({"seconds": round(seconds, 1)}))


if __name__ == "__main__":
    main()
