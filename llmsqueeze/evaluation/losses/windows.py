"""Which tokens of a text a model sees before the one that is scored: windows of the text, and what counts of each.

Of this tool, by default: windows that do not overlap, the last one shorter. Each begins with BOS if the tokenizer has
one. All tokens after the first of a window count.

With a stride: window k begins at token k * stride. Of the first window all tokens count, of each later one only those
beyond the end of the one before, so its last `stride` tokens (fewer at the end of the text). Those are scored after at
least window - stride others. Every token of the text counts once, but for the first if there is no BOS.

Of the papers (GPTQ with 2048 tokens, QuIP# and QTIP with 4096): the rows of the WikiText-2 test split, joined with two
newlines, go through the tokenizer once, with the special tokens that it adds to the whole text. The tokens are cut into
windows that do not overlap, without a BOS for each; what is left at the end is dropped. All tokens after the first of a
window count, and the result is exp of their mean loss. Here the loss is float32, whatever the model computes in.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmsqueeze.errors import CalibrationError, HubError, RecipeError, foreign
from llmsqueeze.evaluation.models import OpenModel
from llmsqueeze.evaluation.options import PAPERS, Reading, part_of
from llmsqueeze.model.config import context_length
from llmsqueeze.text.chat import rendered
from llmsqueeze.text.document import Text
from llmsqueeze.text.rows import after, windows
from llmsqueeze.text.source import WIKITEXT, read_text
from llmsqueeze.text.tokens import token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_WINDOW = 2048
SEPARATOR = "\n\n"  # of the rows


@dataclass(frozen=True)
class Windows:
    """Rows of tokens, int64 [1, length], of which the last `counted` of each count; length: of the longest. notes: what
    a user should know of how the text was read."""

    rows: list[Tensor]
    counted: list[int]
    length: int
    notes: tuple[str, ...] = ()


def read_windows(opened: OpenModel, text: Text, reading: Reading) -> Windows:
    """The windows of a text for a model. Raises RecipeError for windows that the model cannot read."""
    length, text = choose_window(opened, reading), rendered(text, opened.tokenizer)
    if reading.protocol == PAPERS:
        rows = papers_rows(text, opened.tokenizer, length)
        counted = [length - 1] * len(rows)
    elif reading.stride is not None:
        rows, counted = strided_rows(text, opened.tokenizer, length, reading.stride)
    else:
        rows = windows(text, opened.tokenizer, length, tail=True)
        counted = [row.shape[1] - 1 for row in rows]
    kept = part_of(len(rows), reading.limit)
    return Windows(rows[:kept], counted[:kept], length, text.notes)


def choose_window(opened: OpenModel, reading: Reading) -> int:
    """Tokens in a window: those asked for, but no more than the context; by default the context, at most 2048.

    Raises RecipeError for a window of the papers that is longer than the context, and for one not above the stride.
    """
    context = context_length(opened.model.config) or max(DEFAULT_WINDOW, reading.window or 0)
    asked = reading.window or (DEFAULT_WINDOW if reading.protocol == PAPERS else min(context, DEFAULT_WINDOW))
    if reading.protocol == PAPERS and asked > context:
        raise RecipeError(
            f"--protocol papers has windows of {asked} tokens, and {opened.name} reads at most {context}; "
            f"--seq-len {context} can be measured, but not put beside the papers"
        )
    length = min(asked, context)
    if reading.stride is not None and reading.stride >= length:
        raise RecipeError(f"--stride is {reading.stride}; it must be below the window of {length} tokens")
    return length


def strided_rows(
    text: Text, tokenizer: PreTrainedTokenizerBase, length: int, stride: int
) -> tuple[list[Tensor], list[int]]:
    """Overlapping windows [1, length], BOS first if the tokenizer has one, and how many tokens of each count.

    Raises CalibrationError if the text has no token to predict.
    """
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = after(bos, token_ids(text.content, tokenizer))
    if len(ids) + len(bos) < 2:
        raise CalibrationError(f"{text.source} has {len(ids)} tokens, too few to predict one")
    rows, counted, seen = list[Tensor](), list[int](), 1 - len(bos)
    for start in range(0, len(ids), stride):
        end = min(start + length - len(bos), len(ids))
        rows.append(torch.tensor([bos + ids[start:end]]))
        counted.append(end - seen)
        seen = end
        if end == len(ids):
            break
    return rows, counted


def papers_rows(text: Text, tokenizer: PreTrainedTokenizerBase, length: int) -> list[Tensor]:
    """Windows [1, length] of the whole text's tokens. Raises CalibrationError if it does not fill one."""
    with foreign(CalibrationError, "the model's tokenizer cannot read the text"):
        ids = torch.tensor(tokenizer(text.content, verbose=False)["input_ids"])
    if len(ids) < length:
        raise CalibrationError(
            f"{text.source} has {len(ids)} tokens, too few for a window of {length}; take a smaller --seq-len"
        )
    return [ids[i : i + length][None] for i in range(0, len(ids) - length + 1, length)]


def papers_text(source: str | None) -> Text:
    """The rows of the WikiText-2 test split, or the lines of a text file as the Hub has them, joined as in the papers.

    Raises CalibrationError or HubError if it cannot be read.
    """
    path = None if source is None else Path(source).expanduser()
    if path is not None and path.suffix != ".jsonl" and path.is_file():
        return Text(path.name, (SEPARATOR.join(hub_rows(read_text(str(path), "test").content)),))
    if source is not None:
        raise CalibrationError(f"--protocol papers reads WikiText-2 or a text file, and {source} is neither")
    return Text(f"{WIKITEXT.replace(':', ' ')} test", (SEPARATOR.join(_wikitext_rows()),))


def hub_rows(content: str) -> list[str]:
    """The lines of WikiText's own file as the rows of the data set on the Hub: an empty line has no newline there."""
    return [line if line.strip() else "" for line in io.StringIO(content)]


def _wikitext_rows() -> list[str]:
    import datasets

    name, _, config = WIKITEXT.partition(":")
    datasets.disable_progress_bars()
    hint = "name the file wiki.test.raw by --text"
    with foreign(HubError, f"the data set {name} cannot be read from the Hub", hint):
        rows: list[str] = datasets.load_dataset(name, config, split="test")["text"]
    return list(rows)
