"""The lm-eval task `demo_stories`: multiple-choice questions about the demo's stories, generated at run time."""

from __future__ import annotations

from typing import Any

from llmsqueeze.demo.stories import questions

__all__ = ["TASK_NAME", "task_config"]

TASK_NAME = "demo_stories"
SEED = 404
COUNT = 300


def _dataset(**_: Any) -> Any:
    """The questions as a DatasetDict with one split; it ignores the metadata that lm-eval passes."""
    from datasets import Dataset, DatasetDict

    return DatasetDict({"test": Dataset.from_list(questions(SEED, COUNT))})


def task_config() -> dict[str, Any]:
    """The task for `lm_eval.simple_evaluate(tasks=[task_config()])`; it needs no file and no network."""
    return {
        "task": TASK_NAME,
        "custom_dataset": _dataset,
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "target_delimiter": " ",
        "num_fewshot": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1},
    }
