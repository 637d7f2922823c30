"""What the verbs print that measure a model or let it answer: eval, compare, generate."""

from __future__ import annotations

from typing import Any, Literal

from llmsqueeze.cli.schema.fields import Described, Printed, always, sometimes

Metrics = dict[str, dict[str, float]]
MODEL = always("The model, as it was named.")
PERPLEXITY = always("exp of the mean loss per token; null without a text.")
STDERR = always("Its standard error.")
TOKENS = always("Tokens of the text that were predicted.")
KL_MEAN = always("Mean KL divergence from the baseline, in nats per token; null without one.")
KL_P99 = always("99th percentile of the same.")
CHANGED = always("Share of the tokens, 0 to 1, whose likeliest token is not the baseline's.")
TASKS = always(
    "Task -> metric -> value. Beside a baseline also `<metric>_difference`, its `_stderr`, and of right or wrong "
    "answers `_right_to_wrong`, `_wrong_to_right`, `_mcnemar_p`."
)
COMPUTED_IN = always("Dtype of the computation; null if nothing was computed.")
DIFFERENCE = always("Mean loss minus the baseline's, in nats per token; null without a text or a baseline.")
TEXT = always("Source of the text; null without one.")
WINDOW = always("Tokens in a window of it.")
STRIDE = always("Tokens between the beginnings of two windows; null if they do not overlap.")
PROTOCOL = always("`--protocol`; null without.")
LIMIT = always("`--limit`: a number, or a share below 1; null if all was measured.")
SETTINGS = always("Task -> what was asked for beside its definition, by lm-eval's names.")


class Scores(Described):
    """The scores of one model."""

    model: str = MODEL
    perplexity: float | None = PERPLEXITY
    perplexity_stderr: float | None = STDERR
    tokens: int = TOKENS
    kl_mean: float | None = KL_MEAN
    kl_p99: float | None = KL_P99
    top1_changed: float | None = CHANGED
    tasks: Metrics = TASKS
    computed_in: str | None = COMPUTED_IN


class Eval(Scores, Printed):
    """`llmsqueeze eval`: the scores of a model, and those of its baseline."""

    verb: Literal["eval"] = always("Name of the verb.")
    text: str | None = TEXT
    window: int | None = WINDOW
    stride: int | None = STRIDE
    protocol: str | None = PROTOCOL
    nll_difference: float | None = DIFFERENCE
    nll_difference_stderr: float | None = STDERR
    limit: int | float | None = LIMIT
    task_settings: dict[str, dict[str, Any]] = SETTINGS
    baseline: Scores | None = always("The scores of the baseline; null without one.")


class Compared(Described):
    """A model of a comparison; the first is the original."""

    model: str = MODEL
    kind: str = always("`original`, or who made it.")
    method: str | None = always("Its method; null if not known.")
    bits: float | None = always("Mean width of its codes; null if not known.")
    nbytes: int = always("Bytes of all its weights.")
    bits_per_weight: float = always("Bits per weight of its linears.")
    perplexity: float | None = PERPLEXITY
    perplexity_stderr: float | None = STDERR
    nll_difference: float | None = always("Mean loss minus the original's, in nats per token; null without a text.")
    nll_difference_stderr: float | None = STDERR
    kl_mean: float | None = KL_MEAN
    kl_p99: float | None = KL_P99
    top1_changed: float | None = CHANGED
    computed_in: str | None = COMPUTED_IN
    tasks: Metrics = TASKS
    on_frontier: bool = always("Whether no other is as small and as good, and better in one of the two.")


class Compare(Printed):
    """`llmsqueeze compare`: models beside each other."""

    verb: Literal["compare"] = always("Name of the verb.")
    text: str | None = TEXT
    window: int | None = WINDOW
    stride: int | None = STRIDE
    protocol: str | None = PROTOCOL
    limit: int | float | None = LIMIT
    task_settings: dict[str, dict[str, Any]] = SETTINGS
    tokens: int = TOKENS
    models: list[Compared] = always("The models, the original first.")
    left_out: list[str] = always("Why models did not open that were named.")
    kept_in: list[str] | None = sometimes("Folders that hold the comparison now; not of processes that follow.")


class Answer(Described):
    """What a model said."""

    model: str = MODEL
    text: str = always("What it added to the prompt.")
    tokens: int = always("How many tokens that is.")
    seconds: float = always("From the prompt to the last token.")
    dense: bool = always("Whether all layers computed as ordinary ones.")
    tokens_per_second: float | None = always("Tokens a second; null if it took no time.")


class Generate(Printed):
    """`llmsqueeze generate`: what models answered."""

    verb: Literal["generate"] = always("Name of the verb.")
    prompt: str = always("The prompt.")
    answers: list[Answer] = always("The answers; that of the baseline first.")
