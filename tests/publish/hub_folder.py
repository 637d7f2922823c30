"""The record and the scores of a large model, and `llmsqueeze push` against the Hub on this machine."""

from __future__ import annotations

import importlib
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import command

TOKEN = "dummy-token-4711"
SHARDS = tuple(f"model-{number:05d}-of-00003.safetensors" for number in range(1, 4))

SIDECAR: dict[str, Any] = {
    "llmsqueeze_version": "0.1.0",
    "format_version": 1,
    "model": "meta-llama/Llama-3.1-8B",
    "revision": "d04e592bb4f6aa9cfee91e2e20afa771667e1d4b",
    "recipe": {
        "method": "gwq",
        "bits": 3,
        "group_size": 128,
        "symmetric": False,
        "outliers": 0.01,
        "outlier_ranking": "gradient",
        "calibration": None,
        "seed": 0,
        "skip": [],
    },
    "calibration": {
        "source": "Salesforce/wikitext wikitext-2-raw-v1 train",
        "samples": 128,
        "seq_len": 2048,
        "tokens": 262144,
        "sha256": "5e" * 32,
    },
    "bits_per_weight": 3.4125,
    "quantized_weights": 6979321856,
    "nbytes_original": 16060522496,
    "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
}

EVALUATION: dict[str, Any] = {
    "model": "out",
    "perplexity": 7.126,
    "tokens": 12345,
    "kl_mean": 0.0312,
    "kl_p99": 0.2,
    "text": "Salesforce/wikitext wikitext-2-raw-v1 test",
    "tasks": {"piqa": {"acc": 0.7812, "acc_stderr": 0.0101, "alias": "piqa"}},
    "baseline": {
        "model": "meta-llama/Llama-3.1-8B",
        "perplexity": 6.244,
        "tokens": 12345,
        "tasks": {"piqa": {"acc": 0.8003, "acc_stderr": 0.01}},
    },
}


def compared(model: str, kind: str, **scores: Any) -> dict[str, Any]:
    """A row of comparison.json."""
    nothing = ("perplexity", "perplexity_stderr", "nll_difference", "nll_difference_stderr", "kl_mean", "kl_p99")
    row = {"model": model, "kind": kind, "this": False, "nbytes": 1000, "bits_per_weight": 16.0, "tasks": {}}
    return row | dict.fromkeys((*nothing, "top1_changed")) | {"on_frontier": False} | scores


COMPARISON: dict[str, Any] = {
    "text": "Salesforce/wikitext wikitext-2-raw-v1 test",
    "window": 2048,
    "tokens": 67890,
    "models": [
        compared("meta-llama/Llama-3.1-8B", "original", nbytes=16060522496, perplexity=6.25, perplexity_stderr=0.05),
        compared(
            *("/home/carol/Llama-3bit", "llmsqueeze"),
            this=True,
            nbytes=4100000000,
            bits_per_weight=3.4125,
            perplexity=7.13,
            on_frontier=True,
            perplexity_stderr=0.06,
            kl_mean=0.03,
            kl_p99=0.21,
            top1_changed=0.085,
            tasks={"arc_easy": {"acc": 0.61, "acc_stderr": 0.02, "acc_difference": -0.01}},
        ),
        compared("other", "bitsandbytes nf4", nbytes=5000000000, bits_per_weight=4.5, perplexity=7.5),
    ],
}


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file in the folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def front_matter(card: str) -> dict[str, Any]:
    _, front, _ = card.split("---\n", 2)
    value = yaml.safe_load(front)
    assert isinstance(value, dict)
    return value


def run_push(folder: Path, repo: str, *flags: str, endpoint: str, **env: str) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of `llmsqueeze push` against the Hub at `endpoint`, without the user's own settings."""
    from huggingface_hub import constants

    with pytest.MonkeyPatch.context() as patch:
        for key in [key for key in os.environ if key.startswith("HF_")]:
            patch.delenv(key)
        for key, value in (_environment(folder, endpoint) | env).items():
            patch.setenv(key, value)
        patch.setattr(time, "sleep", lambda seconds: None)  # huggingface_hub waits between retries
        importlib.reload(constants)  # it reads the environment
        try:
            return command("push", folder, repo, *flags)
        finally:
            patch.undo()
            importlib.reload(constants)


def _environment(folder: Path, endpoint: str) -> dict[str, str]:
    return {
        "HF_ENDPOINT": endpoint,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(folder.parent / "hf_home"),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }


def assert_refused(result: tuple[int, str, str], *words: str) -> None:
    """Exit code 2, one line that has the words, no traceback, no token."""
    code, out, err = result
    assert (code, out) == (2, ""), err
    message = err.strip().splitlines()[-1]
    for word in words:
        assert word in message
    assert "Traceback" not in err
    assert TOKEN not in err
