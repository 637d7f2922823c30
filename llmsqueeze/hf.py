"""`import llmsqueeze.hf` makes the llmsqueeze format known to transformers, for code that calls `from_pretrained`."""

from __future__ import annotations

from llmsqueeze.formats.hf.layer import SumOfParts
from llmsqueeze.formats.hf.quantizer import LlmsqueezeConfig, LlmsqueezeQuantizer
from llmsqueeze.formats.load import load

__all__ = ["LlmsqueezeConfig", "LlmsqueezeQuantizer", "SumOfParts", "load"]
