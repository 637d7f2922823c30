"""How to distil: the options of the command, checked and with what they imply filled in."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmsqueeze.distillation.options import DistillationOptions
from llmsqueeze.errors import RecipeError
from llmsqueeze.recipe.recipe import TextSettings

WISH, WISH_STEP = 3.0, 0.03  # levels over a run at the full rate, and the most at a step
LAST = 0.1  # of the learning rate is left at the end


@dataclass(frozen=True)
class Distillation:
    """How to distil.

    steps: of the optimizer, for every block where `blockwise`. loss: kd (plain) or dad (weighted by ambiguity, by
    `weight` and `gamma`). lr: learning rate, relative to what is trained. train: what is. moves: share of the codes
    that a step may move, where codes are trained. targets: what a block learns to give, where `blockwise`. top_k: how
    many of the teacher's next tokens are kept. held_back: samples to measure on. The rest: the text, as in a recipe.
    """

    steps: int = 100
    loss: str = "kd"
    lr: float = 5e-3
    weight: float = 1.0
    gamma: float = 1.0
    train: tuple[str, ...] = ("scales", "norms", "lowrank")
    batch_size: int = 4
    moves: float = 1e-2
    blockwise: bool = False
    targets: str = "stream"
    top_k: int = 128
    held_back: int = 32
    calibration: str | None = None
    samples: int = 256
    seq_len: int = 2048
    seed: int = 0

    def rate(self, step: int) -> float:
        """The share of the learning rate at a step: a half cosine down to a tenth."""
        return LAST + (1 - LAST) * (1 + math.cos(math.pi * step / self.steps)) / 2

    def wish(self, step: int) -> float:
        """How far a code with a gradient of mean size is drawn at a step, in levels: the same over any long run."""
        return self.rate(step) * min(WISH / self.steps, WISH_STEP)

    @property
    def text(self) -> TextSettings:
        """The settings of the text."""
        return TextSettings(self.calibration, self.samples, self.seq_len, self.seed)


def make_distillation(given: Mapping[str, Any]) -> Distillation:
    """Checked settings from options; None stands for the default. Raises RecipeError with all that is wrong."""
    values = DistillationOptions.of(given).asked
    settings = Distillation(**values)
    if wrong := _contradictions(settings, values):
        raise RecipeError("\n       ".join(wrong))
    return dataclasses.replace(settings, steps=200) if settings.blockwise and "steps" not in values else settings


def _contradictions(made: Distillation, given: Mapping[str, Any]) -> list[str]:
    found = []
    for key in ("weight", "gamma"):
        if key in given and made.loss != "dad":
            found.append(f"--{key} {given[key]:g} does not apply to --loss {made.loss}; it belongs to dad")
    if made.blockwise and "loss" in given:
        found.append(f"--blockwise contradicts --loss {made.loss}: it matches the outputs of blocks, not of the model")
    if not made.blockwise and "targets" in given:
        found.append(f"--targets {made.targets} needs --blockwise")
    if "moves" in given and "codes" not in made.train:
        found.append(f"--moves {made.moves:g} needs --train codes")
    return found
