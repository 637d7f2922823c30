"""What the models of the verbs are made of: fields with a sentence each, and objects that several verbs print."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Described(BaseModel):
    """An object whose fields are all named, with nothing beside them."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def always(text: str) -> Any:
    """A field that is always there."""
    return Field(description=text)


def sometimes(text: str) -> Any:
    """A field that is there in the cases that the text names."""
    return Field(default=None, description=text)


class Printed(Described):
    """What every verb prints."""

    schema_version: int = always("Version of these objects, one for all verbs.")


class Stage(Described):
    """The time of a stage of a run."""

    seconds: float = always("By the clock.")
    processor_seconds: float = always("Of all processors together.")


class CalibrationText(Described):
    """The text that a run read."""

    source: str = always("Its name.")
    samples: int = always("Rows of tokens.")
    seq_len: int = always("Tokens of the longest row.")
    tokens: int = always("Tokens of all rows.")
    sha256: str = always("Of the tokens.")


class Rounded(Described):
    """What is rounded to a fixed width beside the linears: of other towers and projectors, or embeddings and head."""

    linears: int = always("Their number.")
    bits: int = always("Their width.")
    nbytes: int = always("Their bytes.")
    nbytes_original: int = always("Their bytes in the original.")


OPENS = always("Runtime (`native`, `transformers`, `vllm`) -> why it does not open the result; empty if it should.")
OPENED = always("Runtimes that opened the result here, with the logits that were computed with.")
NOT_OPENED = always("Runtime -> why one that should open the result was not tried, or did not.")
OUT = always("What was written: a folder or a file.")
SECONDS = always("Time of the run.")
PEAK = always("Peak memory of the process, in MB (10^6 bytes); 0 if the platform does not tell it.")
PEAK_DEVICE = always("Peak memory of tensors on a CUDA device, in MB; 0 without one.")
BITS = always("Mean width of the codes.")
BITS_PER_WEIGHT = always("Bits per weight of the compressed linears, with everything counted.")
NBYTES = always("Bytes of all weights of the result.")
NBYTES_ORIGINAL = always("Bytes of all weights of the original.")
PREDICTED = always("Predicted rise of the loss, in nats per token; null if nothing predicts it.")
INTERVAL = always("Where the loss lies in nine of ten cases; null without a prediction.")
FORMAT = always("Format of the result: `compressed-tensors` or `llmsqueeze`.")
WHY_NATIVE = always("Why the result is not in compressed-tensors; null if it is.")
PREDICTED_PORTABLE = always("Predicted rise of the loss of the same bytes in compressed-tensors; null if not known.")
PREDICTED_NATIVE = always(
    "Of a result in compressed-tensors: predicted rise of the loss of the same bytes in our own format, with a width "
    "for every row; null if not known."
)
TIME = always("Stage -> its time, with `--profile-time`; else null.")
