"""What the original model says of every token, kept on disk, so that it need not be there while the student trains.

One safetensors file per sample: `index` and `log_p` [tokens, k] of the k likeliest next tokens, best first, `log_rest`
[tokens] the log of what is left, `entropy` [tokens] of the whole distribution in nats. The model streams through block
by block (blocks.py), and its logits through slices of the vocabulary. What is there already is not made again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from llmsqueeze.distillation.losses import Teacher
from llmsqueeze.errors import OutputError
from llmsqueeze.files import whole_file
from llmsqueeze.model.activations import Spill
from llmsqueeze.model.checkpoint import file_digests, weights_digest
from llmsqueeze.model.skeleton import Skeleton
from llmsqueeze.model.walk import Walk
from llmsqueeze.progress import Progress


def cache_key(skeleton: Skeleton, k: int) -> str:
    """Which teacher, and how much of it is kept."""
    return hashlib.sha256(f"{weights_digest(file_digests(skeleton.checkpoint))} {k}".encode()).hexdigest()[:16]


def row_file(folder: Path, key: str, row: Tensor) -> Path:
    """Where a sample [1, length] has its answers."""
    return folder / f"{key}-{hashlib.sha256(row.numpy().astype('<i8').tobytes()).hexdigest()[:24]}.safetensors"


def ask(
    skeleton: Skeleton,
    rows: Sequence[Tensor],
    folder: Path,
    k: int,
    device: torch.device,
    progress: Progress,
    scratch: Path | None = None,
) -> str:
    """Writes the answers for all `rows` [1, length] that have none in `folder`; returns the key they are under.

    Activations beyond memory go to `scratch`, or to `folder`.
    """
    from safetensors.torch import save_file

    key = cache_key(skeleton, k)
    missing = [row for row in rows if not row_file(folder, key, row).exists()]
    if not missing:
        return key
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with Spill(parent=scratch or folder) as spill:
            walk = Walk(skeleton, missing, spill, torch.float32, device)
            hidden = walk.embed()
            for index in progress.over(range(len(skeleton.blocks)), "teacher", len(skeleton.blocks)):
                with walk.resident_block(index):
                    ahead = walk.through(index, hidden)
                hidden.clear()
                hidden = ahead
            with walk.head.resident(), torch.no_grad():
                for row, last in progress.over(zip(missing, hidden.each(device), strict=True), "answers", len(missing)):
                    said = most_likely(walk, last, k)
                    with whole_file(row_file(folder, key, row)) as half:
                        save_file({name: value.cpu().contiguous() for name, value in vars(said).items()}, half)
    except OSError as error:
        raise OutputError(f"cannot keep the teacher's answers in {folder}: {error}") from error
    return key


def answers(folder: Path, key: str, row: Tensor) -> Teacher:
    """What was written for a sample; index int32."""
    from safetensors.torch import load_file

    return Teacher(**load_file(row_file(folder, key, row)))


def together(said: Sequence[Teacher], device: torch.device) -> Teacher:
    """Several samples' tokens in a row, on `device`."""
    joined = {name: torch.cat([getattr(one, name) for one in said]).to(device) for name in vars(said[0])}
    return Teacher(**joined | {"index": joined["index"].long()})


def most_likely(walk: Walk, hidden: Tensor, k: int) -> Teacher:
    """The head's answers at `hidden` [1, length, width], the last block's output; the last token's are left out."""
    log_z = mean = best = index = None
    for part, logits in walk.head.logits(hidden):
        z = logits.logsumexp(dim=1)
        total = z if log_z is None else torch.logaddexp(log_z, z)
        here = (torch.exp(logits - total[:, None]) * logits).sum(dim=1)
        mean = here if mean is None or log_z is None else here + mean * torch.exp(log_z - total)
        log_z = total
        numbers = torch.arange(part.start, part.stop, device=logits.device).expand_as(logits)
        values = logits if best is None else torch.cat([best, logits], dim=1)
        numbers = numbers if index is None else torch.cat([index, numbers], dim=1)
        best, place = values.topk(min(k, values.shape[1]), dim=1)
        index = numbers.gather(1, place)
    assert log_z is not None
    assert mean is not None
    assert best is not None
    assert index is not None
    log_p = best - log_z[:, None]
    log_rest = torch.log1p(-log_p.exp().sum(dim=1).clamp(max=1.0))
    if best.shape[1] == part.stop:  # nothing is left but rounding
        log_rest = torch.full_like(log_rest, -torch.inf)
    return Teacher(index.int(), log_p, log_rest, log_z - mean)
