"""`import llmsqueeze.hf` makes our format known to transformers, for code that calls `from_pretrained` itself."""

from __future__ import annotations

from llmsqueeze.formats.load import LlmsqueezeConfig, LlmsqueezeQuantizer, SumOfParts, load

__all__ = ["LlmsqueezeConfig", "LlmsqueezeQuantizer", "SumOfParts", "load"]
