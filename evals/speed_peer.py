"""GPTQ of llm-compressor, for `speed.py`. Runs in an environment of its own.

    PEER_ENV/bin/python evals/speed_peer.py JOB.json

JOB.json: model, tokens (the rows), out (the folder to write).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def main() -> None:
    """GPTQ of llm-compressor with its defaults, in float32; writes the packed folder."""
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    job = json.loads(Path(sys.argv[1]).read_text())
    rows, start = job["tokens"], time.monotonic()
    weights = QuantizationArgs(num_bits=3, type="int", symmetric=True, strategy="group", group_size=64)
    scheme = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    oneshot(
        model=AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32),
        tokenizer=AutoTokenizer.from_pretrained(job["model"]),
        dataset=Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}),
        recipe=[GPTQModifier(config_groups=scheme, ignore=["lm_head"])],
        num_calibration_samples=len(rows),
        max_seq_length=len(rows[0]),
        output_dir=job["out"],
    )
    print(json.dumps({"seconds": round(time.monotonic() - start, 1)}))


if __name__ == "__main__":
    main()
