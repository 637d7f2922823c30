"""What the verbs print that make something: quantize, plan, distill, export."""

from __future__ import annotations

from typing import Literal

from llmsqueeze.cli.schema.fields import (
    BITS,
    BITS_PER_WEIGHT,
    FORMAT,
    INTERVAL,
    NBYTES,
    NBYTES_ORIGINAL,
    NOT_OPENED,
    OPENED,
    OPENS,
    OUT,
    PEAK,
    PEAK_DEVICE,
    PREDICTED,
    PREDICTED_NATIVE,
    PREDICTED_PORTABLE,
    SECONDS,
    TIME,
    WHY_NATIVE,
    CalibrationText,
    Described,
    Printed,
    Rounded,
    Stage,
    always,
    sometimes,
)

BLOCK_SCORES = always(
    "Ranking -> its score of every block: `lim`, of which more is more important, or `zd`, of which less is; empty if "
    "blocks are not ranked by them."
)


class Verified(Described):
    """What was read back from disk and compared."""

    tensors: int = always("Tensors that were read.")
    weights: int = always("Compressed weights that were compared, bit by bit.")
    blocks: int = always("Blocks whose outputs were compared.")
    largest_difference: float = always("Largest difference of an output, relative to the largest output.")


class Experts(Described):
    """The matrices of experts that were fitted to inputs."""

    matrices: int = always("How many there are.")
    few: int = always("How many saw few tokens.")
    none: int = always("How many saw no token.")


class LeftOut(Described):
    """What the original holds that its model does not use."""

    tensors: int = always("How many tensors.")
    nbytes: int = always("Their bytes.")


class Round(Described):
    """A size that a search within a bound tried."""

    bits: float = always("Bits per weight.")
    predicted: float = always("Predicted rise of the loss, in nats per token.")
    loss_increase: float = always("Measured rise of the loss on held-back text.")
    perplexity_increase: float = always("The same of the perplexity, as a share.")
    kl_mean: float = always("Mean KL divergence from the original.")
    measured: float = always("The number that the bound is on.")
    kept: bool = always("Whether it is within the bound.")


class Quantize(Printed):
    """`llmsqueeze quantize`: a run in numbers."""

    verb: Literal["quantize"] = always("Name of the verb.")
    out: str = OUT
    model: str = always("The original, as it was named.")
    made_from: str = always("The adapter that was merged first, or how the original was quantized already; else empty.")
    method: str = always("The method.")
    bits: float = BITS
    bits_per_weight: float = BITS_PER_WEIGHT
    nbytes: int = NBYTES
    nbytes_original: int = NBYTES_ORIGINAL
    outliers: int = always("Weights that are kept exactly.")
    predicted_loss_increase: float | None = PREDICTED
    predicted_loss_interval: list[float] | None = INTERVAL
    calibration: CalibrationText | None = always("The text; null if the run needed none.")
    text_begins: str = always("How the first sample of a named text begins, as the model sees it; else empty.")
    seconds: float = SECONDS
    peak_memory_mb: float = PEAK
    peak_device_memory_mb: float = PEAK_DEVICE
    verified: Verified | None = always("What was read back; null with `--no-verify`.")
    opens: dict[str, str] = OPENS
    opened: list[str] = OPENED
    not_opened: dict[str, str] = NOT_OPENED
    format: str = FORMAT
    why_native: str | None = WHY_NATIVE
    predicted_portable: float | None = PREDICTED_PORTABLE
    predicted_native: float | None = PREDICTED_NATIVE
    experts: Experts | None = always("Of a mixture of experts; else null.")
    towers: Rounded | None = always("With `--vision`; null if other towers stay as they are.")
    embeddings: Rounded | None = always("With `--embeddings`; null if embeddings and head are not rounded so.")
    unreached: int = always("Linears that no text reaches, and that were rounded without moments.")
    left_out: LeftOut | None = always("Tensors that the model does not use; null if there are none.")
    ends_nbytes: int = always("Bytes of embeddings and head as they are in the original; 0 if they are compressed.")
    block_scores: dict[str, list[float]] = BLOCK_SCORES
    target: str | None = always("What `--for` names; null without.")
    time: dict[str, Stage] | None = TIME
    rounds: list[Round] | None = sometimes("With a bound on quality: the sizes that were tried.")
    perplexity_increase: float | None = sometimes("With a bound: measured rise of the perplexity, as a share.")
    kl_mean: float | None = sometimes("With a bound: measured KL divergence.")
    kl_before: float | None = sometimes("With distillation: KL divergence before it, on held-back text.")
    kl_after: float | None = sometimes("With distillation: KL divergence after it.")


class PlanRow(Described):
    """Linears whose names differ only by a number."""

    pattern: str = always("Their name, with `*` for the number.")
    count: int = always("How many there are.")
    rows: dict[str, float] = always("Width in bits -> share of the rows; empty if they are coded.")
    blocks: dict[str, list[int]] = always(
        "Width in bits -> the blocks whose linear has it; `2+4` if its rows have both, `coded` if it is coded."
    )
    high_share: float = always("Share of the rows above the narrowest width of the plan.")
    dual: float = always("Share of the rows in two binary planes.")
    rank: float = always("Mean rank of low-rank factors.")
    outliers: float = always("Share of the weights that are kept exactly.")
    nbytes: int = always("Their bytes.")
    bits_per_weight: float = always("Their bits per weight.")
    predicted_loss_increase: float | None = PREDICTED


class Plan(Printed):
    """`llmsqueeze plan`: a decision and what it promises."""

    verb: Literal["plan"] = always("Name of the verb.")
    model: str = always("The original, without its folder.")
    weights_sha256: str | None = always("Checksum of the original's weights; null with `--weights none`.")
    bits_per_weight: float = BITS_PER_WEIGHT
    nbytes: int = NBYTES
    predicted_loss_increase: float | None = PREDICTED
    given: str = always("The original, as it was named.")
    options: list[str] = always("How the command line names the same original, beside its name.")
    out: str = OUT
    method: str = always("The method.")
    bits: float = BITS
    nbytes_original: int = NBYTES_ORIGINAL
    loss: float | None = always("Mean loss of the original on the calibration text; null if it was not measured.")
    predicted_loss_interval: list[float] | None = INTERVAL
    rows: list[PlanRow] = always("The table that is shown.")
    block_scores: dict[str, list[float]] = BLOCK_SCORES
    format: str = FORMAT
    why_native: str | None = WHY_NATIVE
    predicted_portable: float | None = PREDICTED_PORTABLE
    predicted_native: float | None = PREDICTED_NATIVE
    towers: Rounded | None = always("With `--vision`; null if other towers stay as they are.")
    embeddings: Rounded | None = always("With `--embeddings`; null if embeddings and head are not rounded so.")
    curve: list[list[float]] = always("Bits per weight and predicted rise of the loss, by size; empty if not known.")
    blocks: list[list[str]] = always("Names of the linears of each block.")
    weights: dict[str, float] = always("Linear -> its bits per weight.")
    predicted_seconds: float | None = always("Predicted time of `quantize --plan`; null without a trial.")
    predicted_time: dict[str, Stage] | None = always("The same by stage; null without a trial.")
    predicted_peak_memory_mb: float | None = always("Predicted peak memory; null without a trial.")
    predicted_disk_bytes: int = always("Bytes that the run needs on disk.")
    processes: int = always("How many processes the prediction is for.")
    time: dict[str, Stage] | None = TIME


class Distill(Printed):
    """`llmsqueeze distill`: how the training went."""

    verb: Literal["distill"] = always("Name of the verb.")
    out: str = OUT
    model: str = always("The folder that was trained.")
    teacher: str = always("The original.")
    loss: str = always("What was minimised.")
    steps: int = always("Steps that were taken.")
    best_step: int = always("The step whose result was written; 0 if no step helped.")
    kl_before: float = always("KL divergence from the teacher on held-back text, in nats per token, before.")
    kl_after: float = always("The same after.")
    codes_moved: int = always("How often a code moved by one level.")
    guarded: int = always("How often alphas were put in order.")
    stopped: str | None = always("Why the training stopped early; null if it did not.")
    calibration: CalibrationText = always("The text.")
    opens: dict[str, str] = OPENS
    opened: list[str] = OPENED
    not_opened: dict[str, str] = NOT_OPENED
    nbytes: int = NBYTES
    nbytes_before: int = always("Bytes of all weights before.")
    seconds: float = SECONDS
    peak_memory_mb: float = PEAK
    peak_device_memory_mb: float = PEAK_DEVICE


class Export(Printed):
    """`llmsqueeze export`: what was written."""

    verb: Literal["export"] = always("Name of the verb.")
    out: str = OUT
    model: str = always("The folder that was read.")
    target: str = always("The format that was written.")
    linears: int = always("Compressed linears of the folder.")
    nbytes_before: int = always("Bytes of all weights of the folder.")
    opens: dict[str, str] = OPENS
    opened: list[str] = OPENED
    not_opened: dict[str, str] = NOT_OPENED
    nbytes: int = always("Bytes of all weights that were written; 0 for gguf-map.")
    rerounded: str | None = sometimes("Of coded weights, to compressed-tensors: the grid that they were rounded to.")
    predicted_loss_increase: float | None = sometimes(
        "The same: what that costs, in nats per token; null if not known."
    )
    rank: int | None = sometimes("peft: rank of the adapter.")
    adapted: int | None = sometimes("peft: linears that it adapts.")
    adapter_nbytes: int | None = sometimes("peft: its bytes.")
    command: str | None = sometimes("peft: the command that serves both.")
    code: str | None = sometimes("peft: the Python that opens both.")
    types: dict[str, int] | None = sometimes("gguf, gguf-map: llama.cpp's type -> weights of it.")
    rounded: list[str] | None = sometimes("gguf: weights that no type holds exactly; they are rounded to Q8_0.")
    left_in_base: list[str] | None = sometimes("gguf: weights that the base has no tensor for, or of odd widths.")
    commands: list[str] | None = sometimes("gguf-map: the commands that make the file.")
    bits_per_weight: float | None = sometimes("gguf, gguf-map: bits per weight in llama.cpp's types.")
    bits_per_weight_before: float | None = sometimes("gguf, gguf-map: bits per weight of the folder.")
