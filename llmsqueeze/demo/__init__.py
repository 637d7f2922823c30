"""The demo: a story generator, a tiny Llama trained on its stories, and a question task about them.

Everything here works without a network; `stories` needs only the standard library.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["MODEL_DIR"]

MODEL_DIR: Path = Path(__file__).parent / "model"
