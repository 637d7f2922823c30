"""A model in memory, ready to be measured."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING

import torch

from llmsqueeze.formats.load import load
from llmsqueeze.model.original import locate
from llmsqueeze.model.text import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class OpenModel:
    """A model in memory, its tokenizer, and the name by which the user called it."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def open_model(
    name: str, device: torch.device, trust_remote_code: bool, loader: Callable[..., PreTrainedModel] = load
) -> OpenModel:
    """Opens a folder or Hub id, compressed or not, with `loader`."""
    with redirect_stderr(StringIO()):  # progress bars of other libraries
        model = loader(name, trust_remote_code=trust_remote_code, device_map={"": device})
    return OpenModel(name, model, load_tokenizer(locate(name), trust_remote_code))
