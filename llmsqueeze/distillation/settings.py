"""The settings of a distillation, from the options of the command (options.py)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmsqueeze.distillation.options import DistillationOptions
from llmsqueeze.errors import RecipeError
from llmsqueeze.recipe.recipe import TextSettings

CODE_LEVELS, CODE_LEVELS_PER_STEP = 3.0, 0.03  # over a run at the full rate, and at most in one step
CHECKS = 10  # measurements on held-back samples, over a run, at most
BLOCKWISE: dict[str, Any] = {"steps": 200, "batch_size": 4, "lr": 5e-3}  # defaults where they differ
LAST_RATE = 0.1  # share of the learning rate at the end


@dataclass(frozen=True)
class Distillation:
    """How to distil.

    steps: optimizer steps; if `blockwise`, for every block. loss: kd (plain) or dad (weighted by ambiguity, with
    `weight` and `gamma`). lr: learning rate, relative to the trained values. train: their kinds. moves: if codes are
    trained, the share of them that may move in a step. targets: if `blockwise`, the inputs of the original block whose
    output is the target (blockwise.py). top_k: how many of the teacher's most likely tokens are kept. held_back:
    samples to measure on. products: the dtype that the linears of the whole model multiply in while it is trained. The
    rest: the text, as in a recipe.
    """

    steps: int = 100
    loss: str = "kd"
    lr: float = 3e-3
    weight: float = 1.0
    gamma: float = 1.0
    train: tuple[str, ...] = ("scales", "norms", "lowrank")
    batch_size: int = 1
    moves: float = 1e-2
    blockwise: bool = False
    targets: str = "stream"
    top_k: int = 128
    held_back: int = 32
    calibration: str | None = None
    text_field: str | None = None
    samples: int = 256
    seq_len: int = 2048
    pack_documents: bool = True
    seed: int = 0
    products: str = "auto"

    @property
    def every(self) -> int:
        """Optimizer steps between two measurements on held-back samples, which together read no more samples than the
        training."""
        checks = min(CHECKS, max(1, self.steps * self.batch_size // self.held_back))
        return max(1, self.steps // checks)

    def rate(self, step: int) -> float:
        """The share of the learning rate at an optimizer step: a half cosine down to a tenth."""
        return LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * step / self.steps)) / 2

    def code_rate(self, step: int) -> float:
        """Levels that an optimizer step adds to the pending change of a code (trained_parts.py).

        Over a run the sum does not depend on the number of steps, if there are at least 100.
        """
        return self.rate(step) * min(CODE_LEVELS / self.steps, CODE_LEVELS_PER_STEP)

    @property
    def text(self) -> TextSettings:
        """The settings of the text."""
        drawn = self.samples, self.seq_len, self.seed
        return TextSettings(self.calibration, *drawn, self.text_field, self.pack_documents)


def make_distillation(given: Mapping[str, Any]) -> Distillation:
    """Checked settings from options; None stands for the default. Raises RecipeError with all that is wrong."""
    values = DistillationOptions.of(given).asked
    settings = Distillation(**values)
    if wrong := _contradictions(settings, values):
        raise RecipeError("\n       ".join(wrong))
    of_blocks = {name: value for name, value in BLOCKWISE.items() if name not in values}
    return dataclasses.replace(settings, **of_blocks) if settings.blockwise else settings


def _contradictions(settings: Distillation, asked: Mapping[str, Any]) -> list[str]:
    """A message for each pair of options that exclude each other."""
    messages = []
    for key in ("weight", "gamma"):
        if key in asked and settings.loss != "dad":
            messages.append(f"--{key} {asked[key]:g} does not apply to --loss {settings.loss}; it belongs to dad")
    if settings.blockwise and "loss" in asked:
        messages.append(
            f"--blockwise contradicts --loss {settings.loss}: its loss is on the outputs of blocks, not of the model"
        )
    if not settings.blockwise and "targets" in asked:
        messages.append(f"--targets {settings.targets} needs --blockwise")
    if settings.blockwise and "products" in asked:
        messages.append(f"--products {settings.products} contradicts --blockwise, which computes in float32")
    if "moves" in asked and "codes" not in settings.train:
        messages.append(f"--moves {settings.moves:g} needs --train codes")
    return messages
