"""Calibration text that the model generates, for calibration without a text.

A sample is the BOS token if the tokenizer has one, a token drawn uniformly from the vocabulary, and then tokens drawn
from the model's distribution at temperature 1. An end-of-text token does not end the sample. One seed draws everything.
The model computes in its own dtype or in float32, whichever is faster here, so another processor may draw other tokens.
Memory: the whole model in the dtype of its file, and the keys and values of one batch.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmsqueeze.errors import UnsupportedError, foreign
from llmsqueeze.model.casting import compute_in
from llmsqueeze.model.config import auto_class, load_config
from llmsqueeze.model.precision import computing_dtype
from llmsqueeze.parts import dtype_name
from llmsqueeze.progress import Progress
from llmsqueeze.progress.stopwatch import timed
from llmsqueeze.text.tokens import check_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_CACHES = ("logits", "loss", "hidden_states", "attentions")
SOURCE = "text sampled from the model itself"
BATCH = 16


@timed("forward")
def sample_rows(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    length: int,
    seed: int,
    device: torch.device,
    trust_remote_code: bool,
    progress: Progress,
) -> list[Tensor]:
    """`count` token rows, int64 [1, length], of the model in `path`. A larger `count` has the same first rows."""
    model = open_model(path, device, trust_remote_code, progress)
    generator = torch.Generator(device).manual_seed(seed)
    rows: list[Tensor] = []
    batches, given = -(-count // BATCH), 1 if tokenizer.bos_token_id is None else 2
    progress.stage("sample", batches * max(0, length - given))
    for _ in range(batches):
        first = first_tokens(model, tokenizer, BATCH, generator)
        rows += continued(model, first, length, generator, progress).cpu().split(1)
    return rows[:count]


def open_model(path: Path, device: torch.device, trust_remote_code: bool, progress: Progress) -> Any:
    """The model in `path` in the dtype of its file; it computes in the faster of that and float32.

    Raises UnsupportedError if transformers cannot open it.
    """
    with foreign(UnsupportedError, f"transformers cannot open {path}"):
        config = load_config(path, trust_remote_code)
        model: Any = auto_class(config).from_pretrained(
            path, config=config, dtype="auto", device_map={"": device}, trust_remote_code=trust_remote_code
        )
    if (chosen := computing_dtype(model.dtype, device)) != model.dtype:
        progress.note(f"the model is {dtype_name(model.dtype)}, computed in {dtype_name(chosen)}, which is faster here")
        compute_in(model, chosen)
    return model.eval()


def first_tokens(model: Any, tokenizer: PreTrainedTokenizerBase, count: int, generator: torch.Generator) -> Tensor:
    """[count, 2]: the BOS token and a random token that is not special; [count, 1] if there is no BOS token.

    Raises UnsupportedError if all tokens of the vocabulary are special."""
    rows = model.get_input_embeddings().weight.shape[0]
    bos = tokenizer.bos_token_id
    check_ids([torch.tensor([[bos or 0]])], rows)
    special = set(tokenizer.all_special_ids)
    ordinary = torch.tensor([i for i in range(min(rows, len(tokenizer))) if i not in special])
    if not len(ordinary):
        raise UnsupportedError(
            f"no text can begin: all {rows} tokens that the model has embeddings for are special ones; give a text "
            "(--calibration)"
        )
    drawn = torch.randint(len(ordinary), (count, 1), generator=generator, device=generator.device)
    first = ordinary.to(drawn.device)[drawn]
    return first if bos is None else torch.cat([torch.full_like(first, bos), first], dim=1)


@torch.no_grad()
def continued(
    model: Any, tokens: Tensor, length: int, generator: torch.Generator, progress: Progress | None = None
) -> Tensor:
    """[rows, length]: `tokens` [rows, any length], and after them tokens that the model draws."""
    rows = tokens[:, :length]
    arguments = inspect.signature(model.forward).parameters
    kept: dict[str, Any] = {}  # what the model has kept of the tokens so far, by the name under which it takes it
    while rows.shape[1] < length:
        given = rows[:, -1:] if kept else rows
        output = model(input_ids=given, use_cache=bool(kept) or given.shape[1] == tokens.shape[1], **kept)
        kept = {name: value for name, value in output.items() if name in arguments and name not in NO_CACHES}
        last = torch.multinomial(output.logits[:, -1].float().softmax(-1), 1, generator=generator)
        rows = torch.cat([rows, last], dim=1)
        if progress is not None:
            progress.advance()
    return rows
