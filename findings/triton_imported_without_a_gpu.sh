#!/bin/bash
# transformers imports Triton for a model class that uses none of it, on a machine without a GPU: 80 MB in every process.
#
# Versions: torch 2.13.0, transformers 5.23.0, triton 3.7.1 (Linux on x86-64, CPU).
#
# Expected: Triton compiles kernels for GPUs. A process that opens a Llama model on a CPU does not load it. `import
# torch` by itself does not.
#
# Seen: `from transformers import LlamaForCausalLM` imports the package triton if it is installed, and with it the
# library libtriton, which contains LLVM. The resident memory of the process is about 80 MB larger than without the
# package. So two environments that differ in nothing else (a build of torch for CUDA brings Triton, the one for CPUs
# does not) have different peaks of memory on a CPU, and figures of memory from the two cannot be compared.
#
# Output seen:
#   triton installed      after torch 219 MB, imported: False; after LlamaForCausalLM 410 MB, imported: True
#   triton not installed  after torch 218 MB, imported: False; after LlamaForCausalLM 329 MB, imported: False
#   as described
#
# Exits 0 while the behaviour is as described, 1 when it is not. Needs Linux, bash, python3 with venv, pip.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
python="$folder/env/bin/python"
"$python" -m pip install --quiet torch==2.13.0 transformers==5.23.0 triton==3.7.1

cat > "$folder/opens.py" <<'PY'
import json
import sys

def resident():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(fields["VmRSS"].split()[0]) // 1024

import torch

seen = {"torch": resident(), "torch imports it": "triton" in sys.modules}
from transformers import LlamaForCausalLM

seen |= {"llama": resident(), "llama imports it": "triton" in sys.modules}
print(json.dumps(seen))
PY

export CUDA_VISIBLE_DEVICES=
"$python" "$folder/opens.py" > /dev/null # writes the bytecode
with=$("$python" "$folder/opens.py")
"$python" -m pip uninstall --quiet --yes triton
without=$("$python" "$folder/opens.py")

"$python" - "$with" "$without" <<'PY'
import json
import sys

both = {"triton installed": json.loads(sys.argv[1]), "triton not installed": json.loads(sys.argv[2])}
for name, seen in both.items():
    print(
        f"{name:<21} after torch {seen['torch']} MB, imported: {seen['torch imports it']}; "
        f"after LlamaForCausalLM {seen['llama']} MB, imported: {seen['llama imports it']}"
    )
there, absent = both.values()
same = (
    not there["torch imports it"]
    and there["llama imports it"]
    and not absent["llama imports it"]
    and there["llama"] - absent["llama"] > 40
)
print("as described" if same else "NOT as described")
sys.exit(not same)
PY
