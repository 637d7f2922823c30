#!/bin/bash
# compressed-tensors decode codes that an earlier version packed into other numbers, without an error.
#
# Versions: compressed-tensors 0.17.0 (packs) and 0.20.0 (decodes), torch 2.13.0, transformers 5.23.0.
#
# Expected: a file is decoded to what was packed, or refused. The format is called pack-quantized in both versions, and
# nothing in the config tells them apart.
#
# Seen: up to 0.17 a 32-bit word holds as many whole codes as fit; from 0.18 on the codes lie densely, across words. At
# 2, 4 and 8 bits that is the same. At 3, 5, 6 and 7 bits a row has more words in the old packing (103 for 1024 columns
# of 3 bits, not 96), and 0.20 takes the first of them and decodes most of the codes to others. It says nothing.
#
# How: random codes [4, 1024], packed by pack_to_int32 of the one version and decoded by unpack_from_int32 of the other.
#
# Output seen:
#   2 bits: 64 words in a row, 0 % of the codes are others
#   3 bits: 103 words in a row, 87 % of the codes are others
#   4 bits: 128 words in a row, 0 % of the codes are others
#   5 bits: 171 words in a row, 97 % of the codes are others
#   6 bits: 205 words in a row, 98 % of the codes are others
#   7 bits: 256 words in a row, 99 % of the codes are others
#   8 bits: 256 words in a row, 0 % of the codes are others
#   as described
#
# Exits 0 while the behaviour is as described, 1 when it is not. Needs bash, python3 with venv, and pip.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq torch==2.13.0 transformers==5.23.0 numpy==2.4.6 compressed-tensors==0.20.0
"$work/venv/bin/pip" install -qq --no-deps --target "$work/old" compressed-tensors==0.17.0
cd "$work"
cat > packer.py <<'PYTHON'
import importlib
import pkgutil
import sys

import compressed_tensors.compressors as compressors


def found(name):
    """A function of the compressors, wherever this version keeps it."""
    for module in pkgutil.walk_packages(compressors.__path__, compressors.__name__ + "."):
        try:
            content = importlib.import_module(module.name)
        except ImportError:
            continue
        if hasattr(content, name):
            return getattr(content, name)
    raise SystemExit(f"this version has no {name}")


def codes(bits):
    import torch

    half = 1 << (bits - 1)
    return torch.randint(-half, half, (4, 1024), dtype=torch.int8, generator=torch.Generator().manual_seed(bits))
PYTHON
PYTHONPATH="$work/old" "$work/venv/bin/python" - <<'PYTHON'
import compressed_tensors
import torch
from packer import codes, found

assert compressed_tensors.__version__ == "0.17.0"
pack = found("pack_to_int32")
torch.save({bits: pack(codes(bits), bits) for bits in range(2, 9)}, "packed.pt")
PYTHON
"$work/venv/bin/python" - <<'PYTHON'
import compressed_tensors
import torch
from packer import codes, found

assert compressed_tensors.__version__ == "0.20.0"
unpack, packed = found("unpack_from_int32"), torch.load("packed.pt")
wrong = {}
for bits, words in packed.items():
    decoded = unpack(words, bits, torch.Size((4, 1024)))
    wrong[bits] = float((decoded != codes(bits)).float().mean())
    print(f"{bits} bits: {words.shape[1]} words in a row, {wrong[bits]:.0%} of the codes are others".replace("%", " %"))
described = all((share > 0.5) == (bits in (3, 5, 6, 7)) and (share == 0 or share > 0.5) for bits, share in wrong.items())
print("as described" if described else "otherwise than described")
raise SystemExit(not described)
PYTHON
