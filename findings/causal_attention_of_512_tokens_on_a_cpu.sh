#!/bin/bash
# torch on a CPU: causal attention over up to 512 tokens takes as long as attention without a mask.
#
# Versions: torch 2.13.0 (Linux on x86-64, CPU, one thread, float32).
#
# Expected: `scaled_dot_product_attention(..., is_causal=True)` leaves out the products that the mask hides, which are
# almost half of them. A user who computes the attention in pieces, some queries with the keys up to the last of them,
# gives the same kernel smaller tasks and a mask to read, and is not faster.
#
# Seen: the kernel takes keys in blocks of 512, and computes the whole block for every query that sees any of it. So with
# 512 tokens `is_causal` saves nothing, forward or backward. With 2048 tokens it does. In pieces of 64 queries, each by
# the same function with a mask, 512 tokens take two thirds of the time, with the same results up to rounding.
#
# Output seen (ms; the exact times depend on the processor):
#   forward             512 tokens: full 7.69, causal 7.85, causal in pieces 5.73
#   forward + backward  512 tokens: full 27.95, causal 28.21, causal in pieces 20.77
#   forward            2048 tokens: full 116.62, causal 72.73
#   as described
#
# Exits 0 while the behaviour is as described, 1 when it is not. Needs bash, python3 with venv, pip.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
python="$folder/env/bin/python"
"$python" -m pip install --quiet torch==2.13.0 numpy

cat > "$folder/attention.py" <<'PY'
import sys
import time

import torch
from torch.nn.functional import scaled_dot_product_attention as attention

torch.set_num_threads(1)
HEADS, WIDTH, QUERIES = 9, 64, 64


def in_pieces(query, key, value):
    tokens = query.shape[2]
    hidden = torch.full((tokens, tokens), float("-inf")).triu(1)
    pieces = []
    for start in range(0, tokens, QUERIES):
        stop = start + QUERIES
        mask = hidden[start:stop, :stop]
        pieces.append(attention(query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop], attn_mask=mask))
    return torch.cat(pieces, dim=2)


WAYS = {
    "full": attention,
    "causal": lambda *tensors: attention(*tensors, is_causal=True),
    "causal in pieces": in_pieces,
}


def milliseconds(tokens, names, backward=False):
    """The least of many runs of each, in turns."""
    tensors = torch.randn(3, 1, HEADS, tokens, WIDTH, generator=torch.Generator().manual_seed(0)).unbind()
    best = dict.fromkeys(names, float("inf"))
    for _ in range(30):
        for name in names:
            leaves = [tensor.clone().requires_grad_(backward) for tensor in tensors]
            start = time.perf_counter()
            output = WAYS[name](*leaves)
            if backward:
                output.sum().backward()
            best[name] = min(best[name], 1000 * (time.perf_counter() - start))
    return best


def line(head, times):
    print(f"{head} tokens: " + ", ".join(f"{name} {value:.2f}" for name, value in times.items()))


forward, both = milliseconds(512, WAYS), milliseconds(512, WAYS, backward=True)
long = milliseconds(2048, ["full", "causal"])
line("forward             512", forward)
line("forward + backward  512", both)
line("forward            2048", long)
tensors = torch.randn(3, 1, HEADS, 512, WIDTH, generator=torch.Generator().manual_seed(1)).unbind()
equal = torch.allclose(WAYS["causal"](*tensors), in_pieces(*tensors), atol=1e-5)
same = (
    equal
    and forward["causal"] > 0.85 * forward["full"]
    and both["causal"] > 0.85 * both["full"]
    and forward["causal in pieces"] < 0.85 * forward["causal"]
    and both["causal in pieces"] < 0.85 * both["causal"]
    and long["causal"] < 0.8 * long["full"]
)
print("as described" if same else "NOT as described")
sys.exit(not same)
PY
"$python" "$folder/attention.py"
