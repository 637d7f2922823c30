"""Perplexity and divergence against slow twins, and lm-eval end to end on local files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmsqueeze.compress.blocks import quantize
from llmsqueeze.errors import RecipeError, UnsupportedError
from llmsqueeze.evaluation.evaluate import _metrics, divergence, evaluate, find_tasks, remember
from llmsqueeze.model.text import Text, evaluation_text, load_tokenizer
from llmsqueeze.recipe.resolve import make_recipe


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
    result = evaluate("demo", text=Text("t", words), window=64)
    assert result.scores.tokens == count == len(ids)
    assert result.scores.perplexity == pytest.approx(math.exp(total / count), rel=2e-3)  # batches round bf16 otherwise
    assert result.scores.perplexity_stderr is not None
    assert 0 < result.scores.perplexity_stderr < result.scores.perplexity


@pytest.mark.parametrize(
    ("name", "text", "expected"), [("stories260K", "tinystories", 4.66), ("babyllama-361", "tinystories", 2.28)]
)
def test_known_perplexities(shared: Path, name: str, text: str, expected: float) -> None:
    """Over the first windows of the text, so near the published figure, not at it."""
    content = (shared / "data" / text / "eval.txt").read_text()
    result = evaluate(str(shared / "models" / name), text=Text("t", content), limit=150)
    assert result.scores.perplexity == pytest.approx(expected, rel=0.08)


def test_divergence_is_kl(generator: torch.Generator) -> None:
    p, q = (torch.randn(1100, 30, generator=generator) for _ in range(2))
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q)
    )
    assert torch.allclose(divergence(p, q), expected, rtol=1e-4, atol=1e-6)
    assert (divergence(p, p) == 0).all()


def test_a_model_against_itself() -> None:
    result = evaluate("demo", baseline="demo", text=evaluation_text(None, "demo"), limit=3)
    assert result.scores.kl_mean == result.scores.kl_p99 == 0
    assert result.nll_difference == 0
    assert result.baseline is not None
    assert result.scores.perplexity == result.baseline.perplexity


def test_other_vocabularies_cannot_be_compared(shared: Path) -> None:
    with pytest.raises(UnsupportedError, match="vocabularies of different size"):
        evaluate("demo", baseline=str(shared / "models/stories260K"), text=Text("t", "a b c " * 50))


def test_lm_eval_task_from_a_local_file(tmp_path: Path) -> None:
    """An own definition through --include-path: the label is the first choice, which a constant text makes likely."""
    rows = [{"context": "Anna has a", "choices": [" ball .", " zzzz qqqq"], "label": 0} for _ in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "own.yaml").write_text(
        "task: own_choice\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tmp_path / 'rows.jsonl'}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: context\n"
        "doc_to_choice: choices\ndoc_to_target: label\nmetric_list:\n  - metric: acc\n"
    )
    result = evaluate("demo", tasks=["own_choice"], include_path=tmp_path, limit=6)
    assert result.scores.tasks["own_choice"]["acc"] == 1.0
    assert result.scores.perplexity is None
    with pytest.raises(RecipeError, match="did you mean 'own_choice'"):
        find_tasks(["own_choise"], tmp_path)


def test_the_demos_task_shows_what_two_bits_cost(tmp_path: Path) -> None:
    recipe = make_recipe({"method": "rtn", "bits": 2})
    quantize("demo", recipe, tmp_path / "out")
    result = evaluate(str(tmp_path / "out"), baseline="demo", tasks=["demo_stories"], limit=120)
    assert result.baseline is not None
    before, after = (scores.tasks["demo_stories"]["acc"] for scores in (result.baseline, result.scores))
    assert before > 0.6
    assert after < before - 0.1


def test_scores_are_remembered_beside_the_folder(tmp_path: Path) -> None:
    """Later runs add what they measured; local paths are cut to their last component."""
    (tmp_path / "llmsqueeze.json").write_text("{}")
    text = {
        "model": str(tmp_path),
        "perplexity": 3.0,
        "tokens": 9,
        "tasks": {},
        "baseline": {"model": "/a/b", "perplexity": 2.0, "tokens": 9, "tasks": {}},
    }
    tasks = {"model": str(tmp_path), "perplexity": None, "tokens": 0, "tasks": {"t": {"acc": 1.0}}, "baseline": None}
    remember(str(tmp_path), text)
    remember(str(tmp_path), tasks)
    kept = json.loads((tmp_path / "evaluation.json").read_text())
    assert kept["perplexity"] == 3.0
    assert kept["tokens"] == 9
    assert kept["tasks"] == {"t": {"acc": 1.0}}
    assert kept["baseline"]["perplexity"] == 2.0
    assert kept["baseline"]["model"] == "b"
    assert "/" not in kept["model"]


def test_metric_names() -> None:
    raw = {
        "alias": "x",
        "acc,none": 0.5,
        "acc_stderr,none": 0.1,
        "em,strict": 0.2,
        "em_stderr,strict": 0.3,
        "e,none": "N/A",
    }
    assert _metrics(raw) == {"acc": 0.5, "acc_stderr": 0.1, "em_strict": 0.2, "em_strict_stderr": 0.3}
