"""llmsqueeze compresses the weights of large language models.

`llmsqueeze.load(directory)` opens a compressed folder as an ordinary transformers model. Nothing heavy
is imported until it is called, so that the command line starts at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "load"]

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load(directory: str, **kwargs: Any) -> PreTrainedModel:
    """The model in `directory` (a folder or Hub id), ready to run; `kwargs` go to transformers' from_pretrained.

    Registers the llmsqueeze format first, so the one call opens compressed and ordinary folders alike.
    """
    from llmsqueeze.formats import load as hf

    return hf.load(directory, **kwargs)
