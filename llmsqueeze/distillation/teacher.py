"""The original model's predictions for every token, on disk, so that it need not be in memory during training.

One safetensors file per sample, with the fields of `Predictions`; the most likely token comes first. The model streams
through block by block (model/blockwise/walk.py), and its logits in slices of the vocabulary. Predictions that exist
are not made again. Memory: one block, the activations between blocks (spilled past a limit), one slice of logits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llmsqueeze.distillation.losses import Predictions
from llmsqueeze.errors import CheckpointError, OutputError
from llmsqueeze.files import whole_file
from llmsqueeze.model.blockwise.activations import Spill
from llmsqueeze.model.blockwise.walk import Walk
from llmsqueeze.model.checkpoint import file_digests, weights_digest
from llmsqueeze.model.skeleton import Skeleton
from llmsqueeze.model.tensors import shard
from llmsqueeze.parallel import processes
from llmsqueeze.progress import Progress


@dataclass(frozen=True)
class Answers:
    """The predictions of one teacher in a folder. key: hash of its weights and of k, the first part of file names."""

    folder: Path
    key: str

    def file(self, row: Tensor) -> Path:
        """The file of a sample [1, length]."""
        name = hashlib.sha256(row.numpy().astype("<i8").tobytes()).hexdigest()[:24]
        return self.folder / f"{self.key}-{name}.safetensors"

    def has(self, row: Tensor) -> bool:
        """Whether the predictions for a sample are there, as they were written."""
        try:
            return self.file(row).exists() and bool(shard.read(self.file(row)))
        except CheckpointError:
            return False

    def read(self, rows: Sequence[Tensor], device: torch.device) -> Predictions:
        """For the tokens of several samples [1, length], one sample after the other: [rows * (length - 1), k]."""
        samples = [shard.read(self.file(row)) for row in rows]
        joined = {name: torch.cat([one[name] for one in samples]).to(device) for name in samples[0]}
        return Predictions(**joined | {"index": joined["index"].long()})


def ask(
    skeleton: Skeleton,
    rows: Sequence[Tensor],
    folder: Path,
    k: int,
    device: torch.device,
    progress: Progress,
    scratch: Path | None = None,
) -> Answers:
    """Writes the predictions for all `rows` [1, length] that have none in `folder`.

    k: how many of the most likely tokens are kept. scratch: for activations beyond memory, by default `folder`.
    Raises OutputError.
    """
    digest = weights_digest(file_digests(skeleton.checkpoint))
    answers = Answers(folder, hashlib.sha256(f"{digest} {k}".encode()).hexdigest()[:16])
    missing = processes.of_first(lambda: [row for row in rows if not answers.has(row)])
    own = [missing[number] for number in processes.turns(len(missing))]
    if own:
        _answer(skeleton, own, answers, k, device, progress, scratch or folder)
    processes.meet()
    return answers


def _answer(
    skeleton: Skeleton,
    rows: Sequence[Tensor],
    answers: Answers,
    k: int,
    device: torch.device,
    progress: Progress,
    scratch: Path,
) -> None:
    """Writes the predictions for `rows`."""
    folder = answers.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with Spill(parent=scratch) as spill:
            walk = Walk(skeleton, rows, spill, torch.float32, device)
            hidden = walk.embed()
            for index in progress.over(range(len(skeleton.blocks)), "teacher", len(skeleton.blocks)):
                with walk.resident_block(index):
                    ahead = walk.through(index, hidden)
                hidden.clear()
                hidden = ahead
            with walk.head.resident(), torch.no_grad():
                for row, last in progress.over(zip(rows, hidden.each(device), strict=True), "answers", len(rows)):
                    tensors = {
                        name: value.cpu().contiguous() for name, value in vars(predict(walk, last, row, k)).items()
                    }
                    with whole_file(answers.file(row)) as half:
                        shard.write(half, tensors | {"index": tensors["index"].int()})
    except OSError as error:
        raise OutputError(f"cannot write the teacher's answers in {folder}: {error}") from error


def predict(walk: Walk, hidden: Tensor, row: Tensor, k: int) -> Predictions:
    """From the output of the last block for a row [1, length]; the last token has no prediction.

    Over slices of the vocabulary: log_z is the log of the sum of exp(logits) so far, mean the mean of the logits so far
    under their softmax, best and index the k largest logits so far.
    """
    tokens = row.shape[1] - 1
    log_z = torch.full((tokens,), -torch.inf, device=hidden.device)
    mean = torch.zeros(tokens, device=hidden.device)
    best = torch.empty(tokens, 0, device=hidden.device)
    index = torch.empty(tokens, 0, dtype=torch.long, device=hidden.device)
    size = 0
    for part, logits in walk.head.logits(hidden, row):
        total = torch.logaddexp(log_z, logits.logsumexp(dim=1))
        mean = (torch.exp(logits - total[:, None]) * logits).sum(dim=1) + mean * torch.exp(log_z - total)
        log_z = total
        numbers = torch.arange(part.start, part.stop, device=logits.device).expand_as(logits)
        values = torch.cat([best, logits], dim=1)
        best, order = values.topk(min(k, values.shape[1]), dim=1)
        index = torch.cat([index, numbers], dim=1).gather(1, order)
        size = part.stop
    log_p = best - log_z[:, None]
    log_rest = torch.log1p(-log_p.exp().sum(dim=1).clamp(max=1.0))
    if best.shape[1] == size:  # there are no other tokens; the difference is only rounding
        log_rest = torch.full_like(log_rest, -torch.inf)
    return Predictions(index, log_p, log_rest, log_z - mean)
