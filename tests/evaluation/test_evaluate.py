"""Perplexity and divergence against slow twins, and lm-eval end to end on local files."""

from __future__ import annotations

import doctest
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import lm_eval
import lm_eval.evaluator
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmsqueeze.compress.pipeline import compress_model as quantize
from llmsqueeze.demo.task import task_config
from llmsqueeze.errors import CalibrationError, RecipeError, UnsupportedError
from llmsqueeze.evaluation.evaluate import evaluate
from llmsqueeze.evaluation.losses import perplexity
from llmsqueeze.evaluation.losses.perplexity import paired_losses
from llmsqueeze.evaluation.models import open_model
from llmsqueeze.evaluation.tasks import definitions
from llmsqueeze.evaluation.tasks.run import find_tasks
from llmsqueeze.evaluation.tasks.scores import metrics_of
from llmsqueeze.model import precision
from llmsqueeze.progress import Progress
from llmsqueeze.recipe.resolve import make_recipe
from llmsqueeze.text.document import Text
from llmsqueeze.text.rows import windows
from llmsqueeze.text.source import evaluation_text
from llmsqueeze.text.tokens import load_tokenizer


def test_perplexity_is_that_of_the_protocol(demo_dir: Path) -> None:
    """Token by token: every window from its BOS, float32, exp of the mean over all predicted tokens."""
    words = evaluation_text(None, "demo").content[:1500]
    tokenizer = load_tokenizer(demo_dir)
    model = AutoModelForCausalLM.from_pretrained(demo_dir).eval()
    ids = tokenizer(words, add_special_tokens=False)["input_ids"]
    total, count = 0.0, 0
    for start in range(0, len(ids), 63):
        window = [tokenizer.bos_token_id, *ids[start : start + 63]]
        logits = model(torch.tensor([window])).logits[0].float().log_softmax(-1)
        total -= sum(float(logits[i, window[i + 1]].detach()) for i in range(len(window) - 1))
        count += len(window) - 1
    result = evaluate("demo", text=Text("t", (words,)), window=64)
    assert result.scores.tokens == count == len(ids)
    assert result.scores.perplexity == pytest.approx(math.exp(total / count), rel=2e-3)  # batches round bf16 otherwise
    assert result.scores.perplexity_stderr is not None
    assert 0 < result.scores.perplexity_stderr < result.scores.perplexity


@pytest.mark.parametrize(("name", "expected"), [("stories260K", 4.0036), ("babyllama-361", 2.3376)])
def test_known_perplexities(shared: Path, name: str, expected: float) -> None:
    """The first 8 windows of TinyStories; over the whole text the published figures are 4.66 and 2.28."""
    content = (shared / "data" / "tinystories" / "eval.txt").read_text()[:60_000]
    result = evaluate(shared / "models" / name, text=Text("t", (content,)), limit=8)
    assert result.scores.perplexity == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("dtype", ["stored", "float32"])
def test_losses_are_those_of_whole_logits(
    dtype: str, compressed: Callable[[str], Path], demo_of: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slices of a few tokens, the last row shorter, against one softmax over the logits of each row."""
    monkeypatch.setattr(perplexity, "LOGITS_BYTES", 4 * 626 * 37)
    monkeypatch.setattr(perplexity, "BATCH_TOKENS", 128)
    folders = compressed("native"), demo_of(2)
    pair = [open_model(str(folder), torch.device("cpu"), False, dtype) for folder in folders]
    assert {one.computed_in for one in pair} == {"bfloat16" if dtype == "stored" else "float32"}
    rows = windows(evaluation_text("demo", "demo"), pair[0].tokenizer, 64, tail=True)[:5]
    rows.append(rows[-1][:, :23])
    result = paired_losses(*pair, rows, Progress())
    alone = perplexity.losses(pair[0], rows, Progress())
    kl, changed, near = [], 0, 1e-5 if dtype == "float32" else 0.02  # bf16 logits depend on the shape of the product
    for i, row in enumerate(rows):
        with torch.no_grad():
            q, p = (one.model(row).logits[0, :-1].double().log_softmax(-1) for one in pair)
        for log_p, measured in ((q, result.model[i]), (q, alone[i]), (p, result.baseline[i])):
            expected = -log_p.gather(1, row[0, 1:, None])[:, 0]
            torch.testing.assert_close(measured, expected, rtol=near, atol=near)
        kl.append((p.exp() * (p - q)).sum(-1))
        changed += int((q.argmax(-1) != p.argmax(-1)).sum())
    torch.testing.assert_close(result.kl, torch.cat(kl), rtol=near, atol=near)
    assert result.kl_mean > 0.02
    assert abs(result.changed - changed) <= (0 if dtype == "float32" else 3)


def test_the_dtype_is_chosen_by_the_trial_and_named(
    demo_of: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Model and baseline alike; the user hears of it once, and only of another dtype than the file's."""
    folder, words = demo_of(1), Text("t", ("Anna has a ball . " * 30,))
    for seconds, name, count in ((0.2, "float32", 1), (5.0, "bfloat16", 0)):
        monkeypatch.setattr(
            precision, "trial_seconds", lambda _, among, t=seconds: dict.fromkeys(among, 1.0) | {torch.float32: t}
        )
        notes: list[str] = []
        progress = Progress()
        monkeypatch.setattr(progress, "note", notes.append)
        result = evaluate(folder, folder, text=words, window=32, progress=progress)
        assert result.baseline is not None
        assert result.scores.computed_in == result.baseline.computed_in == name
        assert result.as_dict()["computed_in"] == result.as_dict()["baseline"]["computed_in"] == name
        assert notes == ["the model is bfloat16, computed in float32, which is faster here"] * count
        assert result.scores.kl_mean == 0
        own = evaluate(folder, text=words, window=32, dtype="stored").scores.computed_in
        assert own == "bfloat16"


def test_the_dtype_changes_a_result_only_slightly(demo_of: Callable[[int], Path]) -> None:
    words = Text("t", (evaluation_text("demo", "demo").content[:3000],))
    stored, single = (
        evaluate(demo_of(2), text=words, window=64, dtype=dtype).scores for dtype in ("stored", "float32")
    )
    assert stored.perplexity != single.perplexity
    assert stored.perplexity == pytest.approx(single.perplexity, rel=5e-3)


def test_a_model_against_itself(demo_of: Callable[[int], Path], tmp_path: Path) -> None:
    """Paths and a file of text, as a user names them."""
    file = tmp_path / "words.txt"
    file.write_text(evaluation_text("demo", "demo").content[:4000])
    result = evaluate(demo_of(1), demo_of(1), text=str(file), limit=3, device="cpu")
    assert result.text == "words.txt"
    assert result.window == 256
    assert result.scores.tokens == 3 * 255
    assert result.scores.kl_mean == result.scores.kl_p99 == 0
    assert result.nll_difference == 0
    assert result.baseline is not None
    assert result.scores.perplexity == result.baseline.perplexity


def test_the_example_of_the_docstring() -> None:
    example = doctest.DocTestParser().get_doctest(evaluate.__doc__ or "", {"evaluate": evaluate}, "evaluate", None, 0)
    assert len(example.examples) == 3
    assert doctest.DocTestRunner().run(example).failed == 0


def test_bad_values_are_refused_before_anything_opens(demo_of: Callable[[int], Path]) -> None:
    for option, message in (
        ({"limit": 0}, "limit is 0; it must be a whole number from 1"),
        ({"window": 1}, "seq-len is 1; it must be a whole number from 2"),
        ({"batch_size": 0}, "batch-size is 0"),
        ({"dtype": "bfloat16"}, "unknown --dtype 'bfloat16'.*auto, stored, float32"),
        ({"device": "gpu"}, "unknown device 'gpu'"),
        ({"tasks": "demo_stories", "include_path": "nowhere"}, "nowhere is not a folder of task definitions"),
    ):
        with pytest.raises(RecipeError, match=message):
            evaluate("nowhere", **option)  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match=r"there is no text file words\.txt"):
        evaluate("nowhere", text="words.txt")


def test_other_vocabularies_cannot_be_compared(demo_of: Callable[[int], Path], tmp_path: Path) -> None:
    other = Path(shutil.copytree(demo_of(1), tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    tensors = load_file(other / "model.safetensors")
    embeddings = "model.embed_tokens.weight"
    tensors[embeddings] = tensors[embeddings][:-1].clone()
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": len(tensors[embeddings])}))
    with pytest.raises(UnsupportedError, match="vocabularies of different size"):
        evaluate(demo_of(1), other, text=Text("t", ("a b c " * 50,)))


def test_lm_eval_task_from_a_local_file(
    demo_of: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An own definition through `include_path`: the label is the first choice, which a constant text makes likely."""
    # without the thousands of definitions that lm-eval has itself
    monkeypatch.setattr(
        definitions, "task_index", lambda path, _: TaskManager(include_path=path, include_defaults=False)
    )
    rows = [{"context": "Anna has a", "choices": [" ball .", " zzzz qqqq"], "label": 0} for _ in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "own.yaml").write_text(
        "task: own_choice\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tmp_path / 'rows.jsonl'}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: context\n"
        "doc_to_choice: choices\ndoc_to_target: label\nmetric_list:\n  - metric: acc\n"
    )
    result = evaluate(demo_of(1), demo_of(1), tasks="own_choice", include_path=tmp_path, limit=6)
    alike = {"acc_difference": 0, "acc_difference_stderr": 0, "acc_right_to_wrong": 0, "acc_wrong_to_right": 0}
    assert result.baseline is not None
    assert result.baseline.tasks == {"own_choice": {"acc": 1.0, "acc_stderr": 0.0}}
    assert result.scores.tasks == {"own_choice": result.baseline.tasks["own_choice"] | alike | {"acc_mcnemar_p": 1}}
    assert result.task_settings == {"own_choice": {"task": "own_choice", "num_fewshot": 0}}
    assert result.scores.perplexity is None, "a model other than the demo, and no text"
    with pytest.raises(RecipeError, match="did you mean 'own_choice'"):
        find_tasks(["own_choise"], tmp_path)


def test_task_scores_are_those_of_lm_evals_own_entry(
    demo_of: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`simple_evaluate`, which describes the machine as well; that takes seconds. Log-softmax in float32."""
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda _: None)
    opened = open_model(str(demo_of(1)), torch.device("cpu"), False)
    scores = find_tasks(["demo_stories"], limit=12).run(opened, Progress())["demo_stories"]
    expected = lm_eval.simple_evaluate(
        model=HFLM(pretrained=opened.model, tokenizer=opened.tokenizer, batch_size=8, softmax_dtype="float32"),
        tasks=[task_config()],
        limit=12,
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=1000,
    )
    raw = expected["results"]["demo_stories"]
    assert scores.metrics == {"acc": raw["acc,none"], "acc_stderr": raw["acc_stderr,none"]}
    answers = {one["doc_id"]: one["acc"] for one in expected["samples"]["demo_stories"]}
    assert scores.documents == {"acc": answers}
    assert len(answers) == 12


@pytest.mark.thorough
def test_the_demos_task_shows_the_cost_of_two_bits(tmp_path: Path) -> None:
    quantize("demo", make_recipe({"method": "rtn", "bits": 2}), tmp_path / "out", verify=False)
    result = evaluate(
        tmp_path / "out", "demo", tasks=["demo_stories"], text=Text("t", ("Anna has a ball .",)), limit=40
    )
    assert result.baseline is not None
    before, after = (scores.tasks["demo_stories"]["acc"] for scores in (result.baseline, result.scores))
    assert before > 0.6
    assert after < before - 0.1


def test_metric_names() -> None:
    raw = {
        "alias": "x",
        "acc,none": 0.5,
        "acc_stderr,none": 0.1,
        "em,strict": 0.2,
        "em_stderr,strict": 0.3,
        "e,none": "N/A",
    }
    assert metrics_of(raw) == {"acc": 0.5, "acc_stderr": 0.1, "em_strict": 0.2, "em_strict_stderr": 0.3}
