"""Compressed folders for the tests of card and push, and the push itself in a process of its own.

A push runs in a process of its own because huggingface_hub reads HF_ENDPOINT when it is imported.
"""

from __future__ import annotations

import functools
import importlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
TOKEN = "dummy-token-4711"
SHARDS = tuple(f"model-{number:05d}-of-00005.safetensors" for number in range(1, 6))

SERVER = multiprocessing.get_context("forkserver")
MODULES = ["llmsqueeze.cli.app", "llmsqueeze.formats.check", "transformers.models.llama.modeling_llama"]
SERVER.set_forkserver_preload(MODULES)

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


@functools.cache
def compressed() -> tuple[tempfile.TemporaryDirectory[str], Path]:
    """The built-in model in three bits, made once; the first holds the second."""
    from llmsqueeze.compress.blocks import quantize
    from llmsqueeze.recipe.resolve import make_recipe

    held = tempfile.TemporaryDirectory()
    quantize("demo", make_recipe({"method": "rtn", "bits": 3, "portable": False}), Path(held.name) / "demo-3bit")
    return held, Path(held.name) / "demo-3bit"


def make_folder(folder: Path, **changes: Any) -> Path:
    """A folder as `llmsqueeze quantize` leaves it, sound; its sidecar tells of another model, with `changes`."""
    shutil.copytree(compressed()[1], folder)
    true = json.loads((folder / "llmsqueeze.json").read_text(encoding="utf-8"))
    kept = {key: true[key] for key in ("format", "nbytes", "errors")}
    write_json(folder / "llmsqueeze.json", SIDECAR | kept | changes)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file in the folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def front_matter(card: str) -> dict[str, Any]:
    _, front, _ = card.split("---\n", 2)
    value = yaml.safe_load(front)
    assert isinstance(value, dict)
    return value


def run_push(folder: Path, repo: str, *flags: str, endpoint: str, **env: str) -> subprocess.CompletedProcess[str]:
    """`llmsqueeze push` against the Hub at `endpoint`, with nothing of whoever runs the tests.

    In a child of a process that has imported the heavy modules: they take seconds.
    """
    arguments, log = ["push", str(folder), repo, *flags], folder.parent / "log"
    child = SERVER.Process(target=_push, args=(arguments, _environment(folder, endpoint) | env, log))
    child.start()
    child.join(120)
    assert child.exitcode is not None, f"{arguments} hangs"
    out, err = (log.with_suffix(kind).read_text(encoding="utf-8") for kind in (".out", ".err"))
    return subprocess.CompletedProcess(arguments, child.exitcode, out, err)


def run_push_alone(folder: Path, repo: str, *flags: str, endpoint: str) -> subprocess.CompletedProcess[str]:
    """As `run_push`, from nothing, as a user would start it."""
    command = [sys.executable, "-m", "llmsqueeze.cli", "push", str(folder), repo, *flags]
    env = _environment(folder, endpoint)
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120)


def _environment(folder: Path, endpoint: str) -> dict[str, str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return clean | {
        "HF_ENDPOINT": endpoint,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(folder.parent / "hf_home"),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }


def _push(arguments: list[str], env: dict[str, str], log: Path) -> None:
    """In the child: the command line with these arguments, its output in files."""
    for number, kind in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(log.with_suffix(kind), os.O_CREAT | os.O_TRUNC | os.O_WRONLY), number)
    os.environ.clear()
    os.environ.update(env)
    from huggingface_hub import constants

    importlib.reload(constants)  # it reads the environment
    time.sleep = lambda seconds: None  # huggingface_hub waits between retries
    sys.argv = ["llmsqueeze", *arguments]

    from llmsqueeze.cli.app import main

    main()


def assert_refused(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit code 2, one line that holds the words, no traceback, no token."""
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    message = result.stderr.strip().splitlines()[-1]
    for word in words:
        assert word in message
    assert "Traceback" not in result.stderr
    assert TOKEN not in result.stderr
