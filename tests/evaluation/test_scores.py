"""The scores that a folder keeps: what a later run adds, what it replaces, and what is never mixed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmsqueeze.evaluation.scores import Evaluation, Scores, save_scores


def test_scores_are_saved_in_the_folder(tmp_path: Path) -> None:
    """Later runs add what they measured; local paths are cut to their last component."""
    (tmp_path / "llmsqueeze.json").write_text("{}")
    text = {
        "model": str(tmp_path),
        "perplexity": 3.0,
        "tokens": 9,
        "tasks": {},
        "baseline": {"model": "/a/b", "perplexity": 2.0, "tokens": 9, "tasks": {}},
    }
    of_tasks = {"model": str(tmp_path), "perplexity": None, "tokens": 0, "tasks": {"t": {"acc": 1.0}}, "baseline": None}
    save_scores(str(tmp_path), text)
    save_scores(str(tmp_path), of_tasks)
    kept = json.loads((tmp_path / "evaluation.json").read_text())
    assert kept["perplexity"] == 3.0
    assert kept["tokens"] == 9
    assert kept["tasks"] == {"t": {"acc": 1.0}}
    assert kept["baseline"]["perplexity"] == 2.0
    assert kept["baseline"]["model"] == "b"
    assert "/" not in kept["model"]


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    (tmp_path / "llmsqueeze.json").write_text("{}")
    return tmp_path


def saved(folder: Path, baseline: dict[str, Any] | None = None, tasks: Any = None, **about: Any) -> dict[str, Any]:
    """What the folder keeps after a run that measured this; of a text if there is a perplexity."""
    scores = {key: about.pop(key) for key in ("perplexity", "kl_mean", "tokens") if key in about}
    other = None if baseline is None else Scores("original", **baseline)
    save_scores(str(folder), Evaluation(Scores(str(folder), **scores, tasks=tasks or {}), other, **about).as_dict())
    kept: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    return kept


@pytest.mark.parametrize("other", [{"text": "u"}, {"window": 64}, {"stride": 8}, {"protocol": "papers"}])
def test_scores_on_other_windows_are_not_mixed(ours: Path, other: dict[str, Any]) -> None:
    same = {"text": "t", "window": 32}
    saved(
        ours,
        {"perplexity": 2.0, "tasks": {"a": {"acc": 1.0}}},
        {"a": {"acc": 0.5}},
        **same,
        perplexity=3.0,
        kl_mean=0.1,
    )
    kept = saved(ours, **same, perplexity=3.0)
    assert (kept["kl_mean"], kept["baseline"]["perplexity"]) == (0.1, 2.0), "the same windows: the rest still holds"
    kept = saved(ours, **same | other, perplexity=4.0)
    assert (kept["perplexity"], kept["kl_mean"], kept["baseline"]["perplexity"]) == (4.0, None, None)
    assert kept["tasks"] == {"a": {"acc": 0.5}}
    assert kept["baseline"]["tasks"] == {"a": {"acc": 1.0}}
    assert {key: kept[key] for key in other} == other
    kept = saved(ours, **same, perplexity=3.0)
    assert all(kept[key] == same.get(key) for key in other)


def test_scores_beside_another_original_are_not_mixed(ours: Path) -> None:
    saved(ours, {"perplexity": 2.0, "tasks": {"a": {"acc": 1.0}}}, text="t", perplexity=3.0)
    save_scores(str(ours), Evaluation(Scores(str(ours)), Scores("other", tasks={"b": {"acc": 0.0}})).as_dict())
    kept = json.loads((ours / "evaluation.json").read_text())
    assert kept["baseline"]["model"] == "other"
    assert kept["baseline"]["tasks"] == {"b": {"acc": 0.0}}
    assert kept["baseline"]["perplexity"] is None


def test_a_part_of_the_data_is_kept_apart(ours: Path) -> None:
    kept = saved(ours, tasks={"a": {"acc": 0.25}}, text="t", perplexity=9.0, limit=4)
    assert set(kept) == {"limited"}
    kept = saved(ours, tasks={"a": {"acc": 0.5}, "a (2-shot)": {"acc": 0.6}}, text="t", perplexity=3.0)
    assert (kept["perplexity"], kept["limited"]["4"]["perplexity"]) == (3.0, 9.0)
    kept = saved(ours, tasks={"b": {"acc": 0.75}}, limit=0.5)
    assert kept["limited"]["0.5"]["tasks"] == {"b": {"acc": 0.75}}
    kept = saved(ours, tasks={"b": {"acc": 0.1}}, limit=4)
    assert kept["limited"]["4"]["tasks"] == {"a": {"acc": 0.25}, "b": {"acc": 0.1}}, "of the same part"
    assert list(kept["limited"]) == ["0.5", "4"], "the newest last"
    assert kept["tasks"] == {"a": {"acc": 0.5}, "a (2-shot)": {"acc": 0.6}}
