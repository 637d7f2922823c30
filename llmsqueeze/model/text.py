"""Text -> rows of tokens, seeded and hashed. Sources: a local file (txt, jsonl), a Hub data set, the demo's generator.

Calibration rows are windows of the text that do not overlap, in seeded random order. Each begins with the BOS token if
the tokenizer has one. Evaluation uses the same windows, in order, over the whole text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmsqueeze.errors import CalibrationError, CheckpointError, HubError, UnsupportedError, first_line, foreign

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WIKITEXT = "Salesforce/wikitext:wikitext-2-raw-v1"
DEMO = "demo"
SELF = "self"  # the calibration source that means: the model generates the text (sampling.py)


@dataclass(frozen=True)
class Text:
    """A text, and its name in summaries and cards."""

    source: str
    content: str


@dataclass(frozen=True)
class Calibration:
    """Token rows, int64 [1, length], and their source; `held_back` are other rows of the same text."""

    source: str
    rows: list[Tensor]
    sha256: str
    held_back: list[Tensor]

    @property
    def seq_len(self) -> int:
        return self.rows[0].shape[1]

    def as_dict(self) -> dict[str, object]:
        return {
            "source": self.source,
            "samples": len(self.rows),
            "seq_len": self.seq_len,
            "tokens": sum(row.numel() for row in self.rows),
            "sha256": self.sha256,
        }


def calibration_text(source: str | None, model: str) -> Text:
    """The text that `--calibration` names; if it names none, the demo's own for the demo, else WikiText-2 train."""
    if source == DEMO or (source is None and model == DEMO):
        from llmsqueeze.demo import stories

        return Text("the demo's story generator", stories.calibration_text())
    return read_text(source or WIKITEXT, split="train")


def evaluation_text(source: str | None, model: str) -> Text:
    """The text that `--text` names; if it names none, the demo's own for the demo, else WikiText-2 test."""
    if source == DEMO or (source is None and model == DEMO):
        from llmsqueeze.demo import stories

        return Text("the demo's story generator, evaluation seed", stories.evaluation_text())
    return read_text(source or WIKITEXT, split="test")


def read_text(source: str, split: str) -> Text:
    """A local .txt or .jsonl file, or a Hub data set `owner/name[:config[:split]]`.

    Raises CalibrationError if it cannot be used, HubError if the Hub cannot be reached.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        raise CalibrationError(f"{source} is a folder; name a text file (.txt, .jsonl) or a Hub data set")
    if path.exists():
        return Text(path.name, _read_file(path))
    if path.suffix in (".txt", ".jsonl", ".json", ".raw", ".md") or source.startswith((".", "/", "~")):
        raise CalibrationError(f"there is no text file {source}")
    name, _, rest = source.partition(":")
    config, _, named_split = rest.partition(":")
    split = named_split or split
    return Text(f"{name} {config} {split}".replace("  ", " "), _read_hub(name, config or None, split))


def _read_file(path: Path) -> str:
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not text: byte {error.start} is not UTF-8") from error
    except OSError as error:
        raise CalibrationError(f"cannot read {path}: {error}") from error
    if "\0" in content[:1_000_000]:
        raise CalibrationError(f"{path} is not text: it contains NUL bytes")
    if path.suffix == ".json":
        raise CalibrationError(f"{path} is JSON; name plain text, or .jsonl with a text field on every line")
    if path.suffix == ".jsonl":
        content = "\n\n".join(_jsonl_documents(path, content))
    if not content.strip():
        raise CalibrationError(f"{path} is empty")
    return content


def _jsonl_documents(path: Path, content: str) -> list[str]:
    documents = []
    for number, line in enumerate(content.split("\n"), 1):  # splitlines would also cut at U+2028
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise CalibrationError(f"{path} line {number} is not JSON: {error}") from error
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            fields = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
            raise CalibrationError(f"{path} line {number} has no 'text' field that is a string (it has: {fields})")
        documents.append(record["text"])
    return documents


def _read_hub(name: str, config: str | None, split: str) -> str:
    import datasets

    datasets.disable_progress_bars()
    if not _hub_answers(name):
        # a cached data set still loads; any other fails at once, not after half a minute of retries
        datasets.config.HF_HUB_OFFLINE = True
    try:
        rows = datasets.load_dataset(name, config, split=split)
    except (ConnectionError, FileNotFoundError, OSError) as error:
        raise HubError(
            f"the data set {name} is no local file and cannot be read from the Hub ({type(error).__name__}); "
            "name a local text file with --calibration (for eval: --text)"
        ) from error
    except ValueError as error:
        raise CalibrationError(f"the data set {name} cannot be used: {first_line(error)}") from error
    if "text" not in rows.column_names:
        raise CalibrationError(f"the data set {name} has no 'text' column (it has: {', '.join(rows.column_names)})")
    documents = [text for text in rows["text"] if isinstance(text, str)]
    if all(text.endswith("\n") for text in documents if text):
        return "".join(documents)  # lines of one text, as in WikiText
    return "\n\n".join(text for text in documents if text.strip())


def _hub_answers(dataset: str) -> bool:
    """Whether the Hub can be reached. Raises CalibrationError if it has no such data set that the user may read."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        HfApi().dataset_info(dataset, timeout=10)
    except HFValidationError as error:
        raise CalibrationError(f"{dataset} is neither a local text file nor the name of a Hub data set") from error
    except HfHubHTTPError as error:
        raise CalibrationError(
            f"the Hub has no data set {dataset} that you may read ({type(error).__name__}); is the name right, and "
            "does it need a login (hf auth login)?"
        ) from error
    except Exception:  # the HTTP library has its own errors for no route, no name, a refusal, a time-out
        return False
    return True


def load_tokenizer(path: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Raises CheckpointError if transformers can open none."""
    from transformers import AutoTokenizer

    with foreign(CheckpointError, f"{path} has no tokenizer that transformers can open"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    return tokenizer


def hashed(source: str, rows: list[Tensor], held_back: list[Tensor]) -> Calibration:
    """A calibration with the SHA-256 of the tokens in `rows`."""
    digest = hashlib.sha256(b"".join(row.numpy().astype("<i8").tobytes() for row in rows)).hexdigest()
    return Calibration(source, rows, digest, held_back)


def token_ids(content: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of a text, without special ones."""
    with foreign(CalibrationError, "the model's tokenizer cannot read the text"):
        ids: list[int] = tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def check_ids(rows: Iterable[Tensor], vocabulary: int) -> None:
    """Raises UnsupportedError for tokens [1, length] beyond the rows of the model's embeddings."""
    largest = max((int(row.max()) for row in rows if row.numel()), default=0)
    if largest >= vocabulary:
        raise UnsupportedError(
            f"the tokenizer gives ids up to {largest}, beyond the {vocabulary} rows of the model's embeddings: model "
            "and tokenizer do not match (tokens that were added, without resize_token_embeddings?)"
        )


def windows(text: Text, tokenizer: PreTrainedTokenizerBase, length: int, tail: bool = False) -> list[Tensor]:
    """Rows, int64 [1, length], over the whole text that do not overlap; BOS first if the tokenizer has one.

    With `tail` the rest makes a shorter last row, else it is dropped. Raises CalibrationError if the text does not
    fill one row (with `tail`: if it has no token to predict).
    """
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = token_ids(text.content, tokenizer)
    step = length - len(bos)
    shortest = 2 - len(bos) if tail else step
    if len(ids) < shortest:
        raise CalibrationError(
            f"{text.source} has {len(ids)} tokens, too few for one sample of {length}; take a longer text or a "
            "smaller --seq-len"
        )
    whole, beginning = torch.tensor(ids), torch.tensor(bos, dtype=torch.int64)
    starts = range(0, len(ids) - shortest + 1, step)
    return [torch.cat([beginning, whole[i : i + step]])[None] for i in starts]


def calibration_rows(
    text: Text,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    seq_len: int,
    seed: int,
    held_back: int = 0,
    seen: Sequence[Tensor] = (),
) -> Calibration:
    """`samples` rows drawn by seed, or all rows if there are fewer, and the hash of their tokens.

    The next `held_back` rows in that order, or those that are left, are kept apart for measurements. Rows that are
    among the `seen` are drawn last; if they are needed, at most half of the others is kept apart.
    Raises CalibrationError if the text does not fill one row.
    """
    # to tokenize a text far longer than the rows would only cost time and memory
    text = Text(text.source, text.content[: max(1 << 24, 64 * (samples + held_back + len(seen)) * seq_len)])
    rows = windows(text, tokenizer, seq_len)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    known = {_key(row) for row in seen}
    old = [bool(known) and _key(row) in known for row in rows]
    fresh, again = ([rows[i] for i in order if old[i] is seen_before] for seen_before in (False, True))
    if not fresh:
        fresh, again = again, fresh
    left = max(0, len(fresh) - samples)
    apart = min(held_back, max(left, len(fresh) // 2) if again else left)
    start = min(samples, len(fresh) - apart)
    return hashed(text.source, [*fresh[:start], *again][:samples], fresh[start : start + apart])


def _key(row: Tensor) -> bytes:
    """What a row [1, length] is told by."""
    return row.numpy().tobytes()
