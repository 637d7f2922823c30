"""Calibration text that the model generates, for calibration without a text.

A sample is the BOS token if the tokenizer has one, a token drawn uniformly from the vocabulary, and then tokens drawn
from the model's distribution at temperature 1. An end-of-text token does not end the sample. One seed draws everything.
Memory: the whole model in the dtype of its file, and the keys and values of one batch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmsqueeze.errors import UnsupportedError, first_line
from llmsqueeze.progress import Progress
from llmsqueeze.progress.stopwatch import timed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
    model = open_model(path, device, trust_remote_code)
    generator = torch.Generator(device).manual_seed(seed)
    rows: list[Tensor] = []
    starts = range(0, count, BATCH)
    for _ in progress.over(starts, "sample", len(starts)):
        first = first_tokens(model, tokenizer, BATCH, generator)
        rows += continued(model, first, length, generator).cpu().split(1)
    return rows[:count]


def open_model(path: Path, device: torch.device, trust_remote_code: bool) -> Any:
    """The model in `path` in the dtype of its file. Raises UnsupportedError if transformers cannot open it."""
    from transformers import AutoModelForCausalLM

    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype="auto", device_map={"": device}, trust_remote_code=trust_remote_code
        )
    except (ValueError, OSError, RuntimeError, KeyError, ImportError) as error:
        raise UnsupportedError(f"transformers cannot open {path}: {first_line(error)}") from error
    return model.eval()


def first_tokens(model: Any, tokenizer: PreTrainedTokenizerBase, count: int, generator: torch.Generator) -> Tensor:
    """[count, 2]: the BOS token and a random token that is not special; [count, 1] if there is no BOS token."""
    rows = model.get_input_embeddings().weight.shape[0]
    special = set(tokenizer.all_special_ids)
    ordinary = torch.tensor([i for i in range(min(rows, len(tokenizer))) if i not in special])
    drawn = torch.randint(len(ordinary), (count, 1), generator=generator, device=generator.device)
    first = ordinary.to(drawn.device)[drawn]
    bos = tokenizer.bos_token_id
    return first if bos is None else torch.cat([torch.full_like(first, bos), first], dim=1)


@torch.no_grad()
def continued(model: Any, tokens: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """[rows, length]: `tokens` [rows, any length], and after them tokens that the model draws."""
    rows, past, last = tokens[:, :length], None, tokens[:, :length]
    while rows.shape[1] < length:
        output = model(input_ids=last, past_key_values=past, use_cache=True)
        past = output.past_key_values
        last = torch.multinomial(output.logits[:, -1].float().softmax(-1), 1, generator=generator)
        rows = torch.cat([rows, last], dim=1)
    return rows
