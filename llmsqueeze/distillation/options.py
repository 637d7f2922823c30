"""The options of `llmsqueeze distill`."""

from __future__ import annotations

from typing import Any, ClassVar

from llmsqueeze.recipe.options import Asked, one_of
from llmsqueeze.recipe.table import Option, Table, option
from llmsqueeze.recipe.values import boolean, choice, number, several, whole

LOSSES = ("kd", "dad")
TRAINABLE = ("scales", "norms", "lowrank", "codes")
BLOCK_TARGETS = ("stream", "inputs")


def as_in_recipes(name: str, default: str = "") -> Any:
    """The option of a recipe of this name, with another default."""
    same: Option = Asked.option(name)
    return option(same.check, same.text, default or same.default, flag=same.flag)


class DistillationOptions(Table):
    """What the user asked for: one field per option; None is not asked for."""

    kind: ClassVar[str] = "distillation setting"

    steps: int | None = option(whole(1), "Optimizer steps; with --blockwise for every block", "100; --blockwise 200")
    loss: str | None = option(
        choice(LOSSES), "kd, or dad (the paper's: ambiguous tokens count more)", "kd", choices=LOSSES
    )
    lr: float | None = option(
        number(1e-7, 1.0), "Learning rate, relative to the trained values", "0.003; --blockwise 0.005"
    )
    weight: float | None = option(number(0.0, 1e6), "With --loss dad: how much ambiguity counts", "1")
    gamma: float | None = option(number(0.0, 100.0), "With --loss dad: power of the ambiguity", "1")
    train: Any = option(several(TRAINABLE), "Of scales, norms, lowrank, codes", "scales,norms,lowrank")
    batch_size: int | None = option(whole(1), "Samples in a step", "1; --blockwise 4")
    moves: float | None = option(number(0.0, 0.5), "With --train codes: share of them that a step may move", "0.01")
    blockwise: bool | None = option(
        boolean, "Match the output of every block in turn: one block in memory", flag="--blockwise"
    )
    targets: str | None = option(
        choice(BLOCK_TARGETS),
        "With --blockwise: stream (of the original) or inputs (the original block on our inputs)",
        "stream",
        choices=BLOCK_TARGETS,
    )
    top_k: int | None = option(whole(1), "How many of the teacher's next tokens are kept", "128")
    held_back: int | None = option(whole(1), "Samples to measure on, not trained on", "32")
    calibration: str | None = as_in_recipes("calibration")
    text_field: str | None = as_in_recipes("text_field")
    samples: int | None = as_in_recipes("samples", "256")
    seq_len: int | None = as_in_recipes("seq_len")
    pack_documents: bool | None = as_in_recipes("pack_documents")
    seed: int | None = as_in_recipes("seed")
    products: str | None = one_of(
        ("auto", "float32", "bfloat16"),
        "What the linears multiply in while the whole model is trained; auto: bfloat16 if that is clearly faster here",
        "auto",
    )
