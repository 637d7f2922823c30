"""Quantizers: how one weight matrix is rounded, given the grid it may use.

All have one signature: (weight [rows, cols] float32, grid, dtype of the scales, curvature or None, pinned
bool [rows, cols] or None, search) -> Rounded.
"""

from __future__ import annotations

from llmsqueeze.quantizers.descent import descent
from llmsqueeze.quantizers.gptq import gptq
from llmsqueeze.quantizers.rtn import rtn

QUANTIZERS = {"rtn": rtn, "gptq": gptq, "descent": descent}
