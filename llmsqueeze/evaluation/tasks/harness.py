"""lm-eval's model class around a model that is in memory.

Set by its own options: the log-softmax is float32, as sums of bfloat16 log-likelihoods are known to 8 nats in
thousands, and choices that tie go to the first one. `loglikelihood_rolling` reads a text after a prefix token, so it
does without the BOS that some tokenizers add: else that would be asked for after itself, which costs dozens of nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from llmsqueeze.evaluation.models import OpenModel
from llmsqueeze.memory import free_on
from llmsqueeze.model.config import vocabulary

MOST = 64  # requests at a time, as lm-eval tries first
SHARE = 0.5  # of the free memory for what a batch's logits need


class Harness(HFLM):  # type: ignore[misc]
    """lm-eval's HFLM, with float32 log-softmax, texts read after one prefix token, and batches that fit a CPU."""

    def __init__(self, opened: OpenModel, batch_size: int | str, prefix_token_id: int | None) -> None:
        super().__init__(
            pretrained=opened.model,
            tokenizer=opened.tokenizer,
            batch_size=batch_size,
            softmax_dtype="float32",
            prefix_token_id=prefix_token_id,
        )

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text after the prefix token, in nats."""
        self.add_bos_token: bool | None = False  # an option of lm-eval; for prompts, the tokenizer decides
        try:
            sums: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        finally:
            self.add_bos_token = None
        return sums

    def _detect_batch_size(self, requests: Sequence[Any] | None = None, pos: int = 0) -> int:
        """How many requests as long as the one at `pos` go through the model at a time.

        lm-eval tries until a GPU has no memory left. A CPU's system would end the process: there logits are counted.
        """
        if self.device.type != "cpu":
            size: int = super()._detect_batch_size(requests, pos)
            return size
        length = self.max_length
        if requests:
            _, context, continuation = requests[pos]
            length = min(length, len(context) + len(continuation))
        return batch_that_fits(length * vocabulary(self.model.config), self.device)


def batch_that_fits(logits: int, device: torch.device) -> int:
    """How many requests of so many logits each fit into the free memory of a device: a power of two up to MOST."""
    free, size = free_on(device), MOST
    while size > 1 and free is not None and size * logits * 3 * 4 > SHARE * free:  # bf16 twice, float32 twice
        size //= 2
    return size
