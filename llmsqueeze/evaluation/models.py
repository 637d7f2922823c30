"""A model in memory, ready to be measured."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmsqueeze.formats import native
from llmsqueeze.formats.imports.quantized import from_gguf, gguf_file
from llmsqueeze.formats.load import load
from llmsqueeze.memory import keep_freed
from llmsqueeze.model.casting import compute_in
from llmsqueeze.model.original import locate
from llmsqueeze.model.precision import computing_dtype
from llmsqueeze.parts import dtype_name
from llmsqueeze.progress import Progress
from llmsqueeze.text.tokens import check_ids, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class OpenModel:
    """A model in memory, its tokenizer, the name by which the user called it, and the dtype in which it computes."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype

    @property
    def computed_in(self) -> str:
        """The dtype by name."""
        return dtype_name(self.dtype)


def open_model(
    name: str,
    device: torch.device,
    trust_remote_code: bool,
    dtype: str = "auto",
    progress: Progress | None = None,
    loader: Callable[..., PreTrainedModel] = load,
) -> OpenModel:
    """Opens a folder or Hub id, compressed or not, with `loader`, or a GGUF file, whose weights become dense float32
    ones. dtype: one of `precision.DTYPES`.

    `progress` gets a note if the model computes in another dtype than it is stored in.
    """
    keep_freed()
    with redirect_stderr(StringIO()):  # progress bars of other libraries
        if (file := gguf_file(Path(name).expanduser())) is not None:
            model, tokenizer = from_gguf(file, torch.float32)
            model = model.to(device).eval()
        else:
            model = loader(name, trust_remote_code=trust_remote_code, device_map={"": device})
            tokenizer = load_tokenizer(locate(name), trust_remote_code)
    table: Any = model.get_input_embeddings()
    table.register_forward_pre_hook(lambda embeddings, args: check_ids(args[:1], embeddings.weight.shape[0]))
    stored = model.dtype
    chosen = computing_dtype(stored, device, dtype if takes_any_dtype(model) else "stored")
    if chosen != stored:
        compute_in(model, chosen)
    opened = OpenModel(name, model, tokenizer, chosen)
    if progress is not None and chosen != stored:
        reason = "which is faster here" if dtype == "auto" else "as asked"
        progress.note(f"the model is {dtype_name(stored)}, computed in {opened.computed_in}, {reason}")
    return opened


def takes_any_dtype(model: PreTrainedModel) -> bool:
    """Whether the compressed layers of the model, if it has any, take inputs of any dtype: ours and bitsandbytes'."""
    config = getattr(model.config, "quantization_config", None)
    return config is None or getattr(config, "quant_method", None) in (native.METHOD, "bitsandbytes")
