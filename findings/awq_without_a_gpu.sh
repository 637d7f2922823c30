#!/bin/bash
# AWQ of llm-compressor ends in an error on a machine without a GPU, where its GPTQ runs.
#
# Versions: torch 2.13.0, transformers 5.17.0, llmcompressor 0.14.0, compressed-tensors 0.19.0, on a CPU.
#
# Expected: `oneshot` compresses a model on a CPU if there is nothing else. GPTQModifier does, with the same model, data
# and scheme, and AWQ is the cheaper method of the two.
#
# Seen: AWQModifier collects its activations and then raises RuntimeError: it pins the cached inputs of every mapping in
# memory, for copies to a GPU that is not there. That is so for any value of `offload_device`; no option turns it off.
#
# How: a one-block Llama with random weights, four rows of random tokens, 4 bits in groups of 128.
#
# Output seen, behind its log:
#   an accelerator: False
#   GPTQModifier: done
#   AWQModifier: RuntimeError: Cannot access accelerator device when none is available.
#   AWQModifier, offload_device=None: RuntimeError: Cannot access accelerator device when none is available.
#   AWQModifier, offload_device=cpu: RuntimeError: Cannot access accelerator device when none is available.
#   as described
#
# Exits 0 while the behaviour is as described, 1 when it is not. Needs bash, python3 with venv, and pip.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq torch==2.13.0 transformers==5.17.0 llmcompressor==0.14.0 compressed-tensors==0.19.0
export HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES=
cd "$work"
"$work/venv/bin/python" - 2>"$work/log" <<'PYTHON' || { status=$?; tail -n 20 "$work/log" >&2; exit "$status"; }
import sys

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.awq import AWQModifier
from llmcompressor.modifiers.gptq import GPTQModifier
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

torch.manual_seed(0)
words = Tokenizer(models.WordLevel({str(word): word for word in range(96)}, unk_token="0"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0")
rows = torch.randint(96, (4, 32)).tolist()
data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
config = LlamaConfig(
    hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4, vocab_size=96
)
LlamaForCausalLM(config).save_pretrained("model")


def outcome(modifier, **options):
    recipe = [modifier(scheme="W4A16", targets=["Linear"], ignore=["lm_head"], **options)]
    try:
        oneshot(
            model=LlamaForCausalLM.from_pretrained("model"),
            tokenizer=tokenizer,
            dataset=data,
            recipe=recipe,
            num_calibration_samples=len(rows),
            max_seq_length=len(rows[0]),
        )
    except RuntimeError as error:
        return f"RuntimeError: {error}"
    return "done"


results = {
    "GPTQModifier": outcome(GPTQModifier),
    "AWQModifier": outcome(AWQModifier),
    "AWQModifier, offload_device=None": outcome(AWQModifier, offload_device=None),
    "AWQModifier, offload_device=cpu": outcome(AWQModifier, offload_device=torch.device("cpu")),
}
print("an accelerator:", torch.accelerator.is_available())
for name, result in results.items():
    print(f"{name}: {result}")
gptq, *awq = results.values()
described = gptq == "done" and all("accelerator" in result for result in awq)
print("as described" if described else "not as described")
sys.exit(not (described and not torch.accelerator.is_available()))
PYTHON
