"""Text from the model itself, for calibrating without any: first tokens at random, the rest by its own distribution.

A sample is the beginning-of-text token where there is one, a token drawn uniformly from the vocabulary, and then what
the model goes on with at temperature 1; where it ends a text, it begins another. Everything is drawn by one seed.
Memory: the whole model in the dtype of its file, and one batch's keys and values.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmsqueeze.errors import UnsupportedError, first_line
from llmsqueeze.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SOURCE = "text sampled from the model itself"
BATCH = 16


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
    """`count` token rows [1, length] of the model in `path`; of more the first are the same."""
    model = open_original(path, device, trust_remote_code)
    generator = torch.Generator(device).manual_seed(seed)
    rows: list[Tensor] = []
    starts = range(0, count, BATCH)
    for _ in progress.over(starts, "sample", len(starts)):
        first = first_tokens(model, tokenizer, BATCH, generator)
        rows += continued(model, first, length, generator).cpu().split(1)
    return rows[:count]


def open_original(path: Path, device: torch.device, trust_remote_code: bool) -> Any:
    """The model in `path` in the dtype of its file. Raises UnsupportedError."""
    from transformers import AutoModelForCausalLM

    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype="auto", device_map={"": device}, trust_remote_code=trust_remote_code
        )
    except (ValueError, OSError, RuntimeError, KeyError, ImportError) as error:
        raise UnsupportedError(f"transformers cannot open {path}: {first_line(error)}") from error
    return model.eval()


def first_tokens(model: Any, tokenizer: PreTrainedTokenizerBase, count: int, generator: torch.Generator) -> Tensor:
    """[count, 1 or 2]: the beginning-of-text token where there is one, and an ordinary one at random."""
    rows = model.get_input_embeddings().weight.shape[0]
    special = set(tokenizer.all_special_ids)
    ordinary = torch.tensor([i for i in range(min(rows, len(tokenizer))) if i not in special])
    drawn = torch.randint(len(ordinary), (count, 1), generator=generator, device=generator.device)
    first = ordinary.to(drawn.device)[drawn]
    bos = tokenizer.bos_token_id
    return first if bos is None else torch.cat([torch.full_like(first, bos), first], dim=1)


@torch.no_grad()
def continued(model: Any, tokens: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """`tokens` [rows, some] with what the model draws after them, [rows, length]."""
    made, past, last = tokens[:, :length], None, tokens[:, :length]
    while made.shape[1] < length:
        output = model(input_ids=last, past_key_values=past, use_cache=True)
        past = output.past_key_values
        last = torch.multinomial(output.logits[:, -1].float().softmax(-1), 1, generator=generator)
        made = torch.cat([made, last], dim=1)
    return made
