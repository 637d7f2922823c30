"""llmsqueeze compresses the weights of large language models.

The functions `quantize`, `plan`, `load` and `evaluate` do what the commands of these names do. A model is a Hub id
(owner/name), a local folder, or 'demo', a small model that comes with the package. Errors that the input or the machine
causes are `SqueezeError`s. A function imports torch and transformers when it is called, not before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmsqueeze.errors import SqueezeError
from llmsqueeze.progress import stopwatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__version__ = "0.1.0"
__all__ = ["SqueezeError", "__version__", "evaluate", "load", "plan", "quantize"]


def quantize(
    model: str | Path,
    out: str | Path | None = None,
    *,
    plan: str | Path | None = None,
    profile: str | Path | None = None,
    recipe: str | Path | None = None,
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    adapter: str | Path | None = None,
    merge_adapter: bool = False,
    from_quantized: bool = False,
    overwrite: bool = False,
    verify: bool = True,
    restart: bool = False,
    profile_time: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Compresses a model into the folder `out`, by default `<model>-<bits>bit`, and returns the summary of the run.

    options: the options of a recipe by name, for example bits=3, method="gptq", group_size=64; recipes/README.md has
    the table. They replace those of `recipe`, a YAML file or the name of a bundled recipe. plan: a `plan.yaml`, which
    takes the place of all options. profile: measurements of an earlier `plan`. adapter: a LoRA adapter to merge into
    the weights first; merge_adapter: the one in the model's folder. from_quantized: the model may be one that is
    quantized already (a GGUF file may always be). verify: read the result back and compare
    it with the intended weights. restart: start over, instead of going on with what a killed run has done.
    profile_time: measure the time of each stage ("time": wall and processor seconds). The summary has sizes in bytes
    ("nbytes", "nbytes_original"), "bits_per_weight" with everything counted, "seconds", peak memory in MB (10**6
    bytes), and more.

    Raises SqueezeError: RecipeError for an option, CheckpointError or UnsupportedError for the model, CalibrationError
    or HubError for the calibration text, OutputError for the folder, VerificationError for the result.

    >>> summary = quantize("demo", "demo-3bit", bits=3, method="gptq", samples=2, seq_len=64)
    >>> summary["nbytes"] < 0.5 * summary["nbytes_original"]
    True
    """
    from llmsqueeze.compress.quantize import quantize as compress
    from llmsqueeze.model.original import Source

    with stopwatch.running(stopwatch.Stopwatch() if profile_time else None):
        return compress(
            Source(str(model), revision, trust_remote_code, _text(adapter), merge_adapter, from_quantized),
            _settings(recipe, options),
            _path(out),
            plan=_path(plan),
            profile=_path(profile),
            device=device,
            overwrite=overwrite,
            verify=verify,
            restart=restart,
        )


def plan(
    model: str | Path,
    out: str | Path | None = None,
    *,
    recipe: str | Path | None = None,
    weights: bool = True,
    trial: bool = True,
    profile_time: bool = False,
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    adapter: str | Path | None = None,
    merge_adapter: bool = False,
    from_quantized: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Measures a model and decides the bits of every weight; compresses nothing.

    Writes `plan.yaml` and the profile into the folder `out`, by default `<model>-plan`, and returns the plan in short:
    "bits_per_weight", "nbytes", the predicted costs and more. `quantize(model, plan="<out>/plan.yaml")` follows it.
    options, recipe: as in `quantize`. weights: False reads config.json only, and all linears get the same bits.
    trial: compress two blocks to predict time ("predicted_seconds", by stage "predicted_time") and memory.
    adapter, merge_adapter, from_quantized: as in `quantize`.
    profile_time: measure the time of each stage of the plan itself ("time").

    Raises SqueezeError: RecipeError for an option (BudgetError if the budget is too small), CheckpointError or
    UnsupportedError for the model, CalibrationError or HubError for the calibration text, OutputError for the folder.

    >>> decided = plan("demo", "demo-plan", bits=3.5, method="layerwise", samples=2, seq_len=64, trial=False)
    >>> decided["bits_per_weight"] <= 3.5
    True
    """
    from llmsqueeze.compress.plan import plan as decide
    from llmsqueeze.model.original import Source

    with stopwatch.running(stopwatch.Stopwatch() if profile_time else None):
        return decide(
            Source(str(model), revision, trust_remote_code, _text(adapter), merge_adapter, from_quantized),
            _settings(recipe, options),
            _path(out),
            device=device,
            weights=weights,
            trial=trial,
        )


def load(model: str | Path, *, keep_codes: bool = False, **kwargs: Any) -> PreTrainedModel:
    """A compressed or ordinary model as a transformers model in evaluation mode.

    keep_codes: decode coded weights into integers of one byte each, not into the model's dtype: less memory, slower.
    kwargs: those of transformers' `from_pretrained`, for example dtype, device_map, revision, trust_remote_code.

    Raises CheckpointError if the folder is damaged or a weight is missing, UnsupportedError if transformers cannot open
    it, HubError if the Hub cannot be reached or refuses.

    >>> load("demo-3bit").config.num_hidden_layers
    4
    """
    from llmsqueeze.formats.load import load as open_folder

    return open_folder(str(model), keep_codes=keep_codes, **kwargs)


def evaluate(
    model: str | Path,
    *,
    baseline: str | Path | None = None,
    text: str | None = None,
    tasks: Sequence[str] = (),
    include_path: str | Path | None = None,
    limit: float | None = None,
    seq_len: int | None = None,
    stride: int | None = None,
    protocol: str | None = None,
    batch_size: int | str = 8,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    system_instruction: str | None = None,
    gen_kwargs: Mapping[str, Any] | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Measures a model, compressed or not, and `baseline` in the same way; returns the scores.

    text: a text file or a Hub data set; by default the demo's own text for the demo, else WikiText-2, or no text if
    there are tasks. tasks: names of lm-eval tasks and groups, wildcards, YAML files, or "demo_stories". include_path: a
    folder with more tasks. limit: at most so many windows of text and documents of each task, or this share of them.
    seq_len: tokens in a window. stride: tokens between the beginnings of two windows. protocol: "papers", as GPTQ and
    QTIP read WikiText-2. batch_size: of tasks, or "auto". num_fewshot and what follows: as in lm-eval.
    The scores have "perplexity", "tasks" and, with a baseline, "kl_mean" (nats per token) and "baseline".

    Raises SqueezeError: RecipeError for an unknown task, CalibrationError or HubError for the text, CheckpointError or
    UnsupportedError for the model.

    >>> scores = evaluate("demo-3bit", baseline="demo", text="demo", limit=4)
    >>> scores["perplexity"] < 1.2 * scores["baseline"]["perplexity"]
    True
    """
    from llmsqueeze.evaluation.evaluate import evaluate as measure
    from llmsqueeze.evaluation.tasks.options import TaskOptions

    return measure(
        model,
        baseline,
        text=text,
        tasks=tasks,
        include_path=include_path,
        limit=limit,
        window=seq_len,
        stride=stride,
        protocol=protocol,
        batch_size=batch_size,
        task_options=TaskOptions(
            num_fewshot=num_fewshot,
            apply_chat_template=apply_chat_template,
            system_instruction=system_instruction,
            gen_kwargs=gen_kwargs or {},
        ),
        device=device,
        trust_remote_code=trust_remote_code,
    ).as_dict()


def _settings(recipe: str | Path | None, options: dict[str, Any]) -> dict[str, Any]:
    from llmsqueeze.recipe.bundled import find_recipe, read_recipe

    return {**(read_recipe(find_recipe(str(recipe))) if recipe else {}), **options}


def _text(path: str | Path | None) -> str | None:
    return None if path is None else str(path)


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)
